"""M heads of one shape, trained in lockstep: tensors hold the parameters of all of them, with M as first dimension.

The steps of a single head are many small operations, which leave most of a machine idle. Stacked heads run each
operation once for all M (`torch.vmap`), on tokens that are read once.

Shape legend: M heads, B questions, T frames, N patches a frame, A answers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from egopatch.configs.schema import ConfigError, TrainConfig
from egopatch.features.common.machine import has_bfloat16
from egopatch.train.data.batch import Batch
from egopatch.train.data.question_table import NO_CLASS
from egopatch.train.heads import PSA, Choice, errors_kept, unwrapped
from egopatch.train.heads.common.noise import Noise, mix
from egopatch.train.heads.psa.selection import PatchSelection
from egopatch.train.ops.philox import Draw
from egopatch.train.processes.distributed import ALONE, Distributed
from egopatch.train.steps.captured import CapturedStep
from egopatch.train.steps.loss import contrast, cross_entropy
from egopatch.train.steps.optim import FlatParameters, build_optimiser, learning_rate, set_rate

GRADIENT_NORM = 1.0
# Replaces the step in the position of noise at evaluation.
EVALUATION = -1


@dataclass(frozen=True)
class LearnedStep:
    """Report of one step. The values stay on the device, because reading them would wait for the step to end.

    Attributes:
        number: Number of the step, from 1.
        rate: Its learning rate.
        values: [2, M]: loss and norm of the gradient of each head.
    """

    number: int
    rate: float
    values: Tensor


class StackedHeads:
    """Training steps and answers of M heads.

    Args:
        heads: Heads on `device` that differ only in their weights and in the patches they keep. They are not used
            afterwards.
        seeds: Seed of each head; decides its noise.
        train: Hyper-parameters, except the seed.
        steps: Number of steps of the whole training, which the schedule covers.
        device: Device of the batches.
        ranks: Processes that learn together, each from its slice of a batch; their heads always stay equal.

    Attributes:
        step: Number of optimiser steps done.
        tensors: [M, ...] values of parameters and buffers by name; trainable parameters are views of `parameters`.
        parameters: The trainable parameters.
        captured: Runs the step on a padded batch, on a GPU as a CUDA graph.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        seeds: Sequence[int],
        train: TrainConfig,
        steps: int,
        device: torch.device,
        ranks: Distributed = ALONE,
    ) -> None:
        self.seeds, self.train, self.steps, self.device = tuple(seeds), train, steps, device
        self.ranks = ranks
        self.step = 0
        try:
            self._head = copy.deepcopy(heads[0])
        except (TypeError, RuntimeError) as error:
            raise ConfigError(
                f"the head {type(unwrapped(heads[0])).__name__} cannot be copied ({error}); expected only modules, "
                "tensors without a history and plain values as its attributes, no locks or open files"
            ) from error
        selections = [[m for m in head.modules() if isinstance(m, PatchSelection)] for head in heads]
        for selection, *others in zip([m for m in self._head.modules() if isinstance(m, PatchSelection)], *selections):
            selection.ks = tuple(other.ks[0] for other in others)
        noises = {name: module for name, module in self._head.named_modules() if isinstance(module, Noise)}
        self._noises = list(noises.values())
        self._position = torch.zeros(2, dtype=torch.long, device=device)
        numbers = torch.arange(len(heads), device=device)
        self._head_numbers = {f"{name}.head_number": numbers for name in noises}
        states = [head.state_dict() for head in heads]
        self.tensors = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        trainable = [name for name, p in heads[0].named_parameters() if p.requires_grad]
        self.parameters = FlatParameters({name: self.tensors[name] for name in trainable})
        self.tensors |= self.parameters.views(self.parameters.flats)
        self.optimiser = build_optimiser(self.parameters, train)
        self._flat_averages = [flat.detach().clone() for flat in self.parameters.flats] if train.ema else []
        self._average = self.parameters.views(self._flat_averages) if train.ema else {}
        self._pending_losses: list[Tensor] = []
        self.captured = CapturedStep()

    def __len__(self) -> int:
        return len(self.seeds)

    def learn(self, batch: Batch, last: bool = False) -> LearnedStep | None:
        """Learn from one batch; make a step after `train.accumulate` batches and after the `last` one of an epoch.

        Nothing here reads a value back from the device. Returns the step if one was made.
        """
        assert self.optimiser is not None
        self._head.train()
        self._set_noise(batch, self.step * self.train.accumulate + len(self._pending_losses))
        rate = learning_rate(self.step, self.steps, self.train)
        set_rate(self.optimiser, rate)
        if batch.padded and self.train.accumulate == 1:
            values = self.captured.run(self._learn_whole, batch)
        else:
            self._pending_losses.append(self._backward(batch))
            if not last and len(self._pending_losses) < self.train.accumulate:
                return None
            values = self._make_step()
        self.step += 1
        return LearnedStep(self.step, rate, values)

    def _learn_whole(self, batch: Batch) -> Tensor:
        """One step from one batch, on the device alone; returns its `LearnedStep.values`."""
        self._pending_losses.append(self._backward(batch))
        return self._make_step()

    def _make_step(self) -> Tensor:
        """A step with the gradients since the last one; returns its `LearnedStep.values`."""
        assert self.optimiser is not None
        norms = self._clip_gradients(len(self._pending_losses))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.train.ema:
            for average, flat in zip(self._flat_averages, self.parameters.flats, strict=True):
                average.lerp_(flat.detach(), 1 - self.train.ema)
        losses, *more = self._pending_losses
        if more:
            losses = torch.stack(self._pending_losses).mean(dim=0)
        self._pending_losses = []
        return torch.stack([losses, norms])

    @torch.no_grad()
    def answer(self, batch: Batch, number: int, keep_patches: bool = True) -> tuple[Tensor, Tensor | None]:
        """Classes [M, B] and the patches [M, B, T, N] bool that psa keeps, for batch `number`, on the CPU.

        The averaged weights answer if there are any. Answers depend neither on the step nor on the number of ranks.
        Without `keep_patches` the patches are None, and not copied to the CPU.
        """
        logits, kept = self.logits(batch, number)
        return logits.argmax(dim=-1).cpu(), kept.cpu() if keep_patches and kept is not None else None

    @torch.no_grad()
    def logits(self, batch: Batch, number: int) -> tuple[Tensor, Tensor | None]:
        """Logits [M, B, A] and kept patches, as `answer`, on the device."""
        self._head.eval()
        self._set_noise(batch, EVALUATION, number)
        tensors = {**self.tensors, **self._average}
        with self._autocast():
            if isinstance(unwrapped(self._head), PSA):
                return self._map_heads(lambda head: _logits_and_kept(head, batch), tensors)
            logits = self._map_heads(lambda head: head(batch), tensors)
        if logits.isnan().any() and all(self.finite()):  # `RunGroup` fails runs with weights that are not finite
            raise ConfigError(
                f"the head {type(unwrapped(self._head)).__name__} answers with logits that are NaN, although its "
                "weights are finite; expected numbers in eval mode as well: correct its forward"
            )
        return logits, None

    def finite(self) -> list[bool]:
        """Whether all weights of each head are finite."""
        finite = torch.ones(len(self), dtype=torch.bool, device=self.device)
        for flat in self.parameters.flats:
            finite &= flat.detach().isfinite().all(dim=1)
        return finite.tolist()

    @torch.no_grad()
    def reset(self, number: int) -> None:
        """Set the weights of a head that has diverged to zero, so that the stack computes with finite numbers."""
        assert self.optimiser is not None
        for flat in self.parameters.flats:
            moments = [value for value in self.optimiser.state[flat].values() if value.ndim > 0]
            for stacked in (flat, *moments):
                stacked[number] = 0
        for average in self._flat_averages:
            average[number] = 0

    def weights(self, number: int) -> dict[str, Tensor]:
        """The weights of one head for evaluation and for saving, under the head's own names."""
        return {name: tensor[number].detach() for name, tensor in {**self.tensors, **self._average}.items()}

    @torch.no_grad()
    def load_weights(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of one head.

        Raises:
            ValueError: The weights belong to another head.
        """
        if missing := sorted(self.tensors.keys() - weights.keys()):
            raise ValueError(f"{missing[0]} is missing")
        if unexpected := sorted(weights.keys() - self.tensors.keys()):
            raise ValueError(f"{unexpected[0]} is unexpected")
        for name, tensor in weights.items():
            if tensor.shape != self.tensors[name].shape[1:]:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(self.tensors[name].shape[1:])}")
            for stacked in (self.tensors, self._average):
                if name in stacked:
                    stacked[name][number].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to resume exactly here: tensors and plain values only."""
        return {
            "step": self.step,
            "tensors": {name: tensor.detach() for name, tensor in self.tensors.items()},
            "average": self._average,
            "optimiser": None if self.optimiser is None else self.parameters.optimiser_state(self.optimiser),
            # Losses and gradients of the batches since the last step.
            "held": self._pending_losses,
            "gradients": self.parameters.views([flat.grad for flat in self.parameters.flats]),
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`."""
        self.step = state["step"]
        for name, tensor in state["tensors"].items():
            self.tensors[name].copy_(tensor)
        for name, tensor in state["average"].items():
            self._average[name].copy_(tensor)
        if self.optimiser is not None:
            self.parameters.load_optimiser_state(self.optimiser, state["optimiser"])
        self._pending_losses = [loss.to(self.device) for loss in state["held"]]
        if state["gradients"]:
            for flat in self.parameters.flats:
                flat.grad = torch.zeros_like(flat)
            for name, view in self.parameters.views([flat.grad for flat in self.parameters.flats]).items():
                if name in state["gradients"]:
                    view.copy_(state["gradients"][name])

    def _map_heads(self, call: Any, tensors: Mapping[str, Tensor]) -> Any:
        """`call(head)` for every head, stacked along a new first dimension [M, ...]."""
        caller = _Caller(self._head, call)
        named = {f"head.{name}": tensor for name, tensor in {**tensors, **self._head_numbers}.items()}
        if len(self) == 1:
            # squeeze gives a view, and so is its gradient: indexing would fill and copy a gradient for every weight.
            out = functional_call(caller, {name: tensor.squeeze(0) for name, tensor in named.items()}, ())
            return tuple(tensor[None] for tensor in out) if isinstance(out, tuple) else out[None]
        # "same": heads from outside that draw from torch's own generator draw the same for all.
        try:
            return torch.vmap(lambda tensors: functional_call(caller, tensors, ()), randomness="same")(named)
        except RuntimeError as error:
            if not str(error).startswith("vmap: "):
                raise
            raise ConfigError(
                f"the head {type(unwrapped(self._head)).__name__} is registered with stacks=True, but torch.vmap "
                f"cannot run its forward ({str(error).partition('. ')[0]}); remove that operation, or stacks=True"
            ) from error

    def _backward(self, batch: Batch) -> Tensor:
        """Add the gradients of the whole batch, summed over the ranks; returns its losses [M]."""
        flats = self.parameters.flats
        gradients: list[Tensor | None] = [None] * len(flats)
        if len(batch):
            question_losses = self._losses(batch)
            questions: Tensor | int = batch.total_questions
            if batch.padded:  # a CUDA graph would freeze a number
                asked = batch.answers != NO_CLASS
                question_losses, questions = torch.where(asked, question_losses, 0), asked.sum()
            rank_losses = question_losses.sum(dim=1)
            share = torch.ones_like(rank_losses) / questions
            leaves = self.parameters.leaves
            leaf_gradients = torch.autograd.grad(rank_losses, list(leaves.values()), share, allow_unused=True)
            gradients = [*self.parameters.flatten(dict(zip(leaves, leaf_gradients, strict=True)))]
            losses = rank_losses.detach() / questions
        else:
            losses = torch.zeros(len(self), device=self.device)
        if self.ranks.size > 1:
            total, *gradients = self.ranks.sum_tensors([losses, *gradients], [losses, *flats])
            assert total is not None
            losses = total
        for flat, gradient in zip(flats, gradients, strict=True):
            if gradient is not None:
                flat.grad = gradient if flat.grad is None else flat.grad + gradient
        return losses

    def _losses(self, batch: Batch) -> Tensor:
        """Loss of each question, [M, B]."""
        tensors = self.tensors | self.parameters.leaves
        with self._autocast():
            logits = self._map_heads(lambda head: head(batch), tensors)
        if not logits.requires_grad:
            raise ConfigError(
                f"the head {type(unwrapped(self._head)).__name__} returns logits without a gradient; expected logits "
                "that are computed from its trainable parameters: remove torch.no_grad, detach or the like from its "
                "forward, or freeze the parameters with requires_grad_(False) if nothing is to be learned"
            )
        answers = batch.answers.clamp_min(0) if batch.padded else batch.answers
        loss = cross_entropy(logits.float(), answers, self.train.label_smoothing)
        return loss + self.train.contrast * self._contrast(logits, batch, tensors) if self.train.contrast else loss

    def _contrast(self, logits: Tensor, batch: Batch, tensors: Mapping[str, Tensor]) -> Tensor:
        """`contrast` [M, B] of the questions' logits [M, B, A]; questions and variants have the same dropout, so that
        they differ in words alone.
        """
        assert batch.variants is not None
        found = []
        for variant in batch.variants:
            self._set_rows(variant)
            with self._autocast():
                found.append(self._map_heads(lambda head, variant=variant: head(variant), tensors))
        paraphrase, counterfactual = found
        return contrast(logits, paraphrase, counterfactual, batch.options)

    def _set_noise(self, batch: Batch, *numbers: int) -> None:
        first, second = (*numbers, 0)[:2]
        self._position[0].fill_(first)
        self._position[1].fill_(second)
        for place, noise in enumerate(self._noises):
            noise.draw = Draw(self.seeds, place, self._position)
        self._set_rows(batch)
        # Heads from outside may draw from torch's own generator, as nn.Dropout does: a resumed run draws the same.
        torch.manual_seed(mix(self.seeds[0], *numbers))

    def _set_rows(self, batch: Batch) -> None:
        for noise in self._noises:
            rows = None if batch.rank_slice is None else getattr(batch.rank_slice, noise.over)
            noise.draw = replace(noise.draw, rows=rows)

    @torch.no_grad()
    def _clip_gradients(self, batches: int) -> Tensor:
        """Average the sums over `batches` and clip each head's gradient; returns the norms before clipping, [M]."""
        gradients = [flat.grad for flat in self.parameters.flats if flat.grad is not None]
        norms = reduce(torch.hypot, [torch.linalg.vector_norm(gradient, dim=1) for gradient in gradients])
        if batches > 1:
            norms /= batches
        factor = (GRADIENT_NORM / (norms + 1e-6)).clamp(max=1)
        if batches > 1:
            factor /= batches
        for gradient in gradients:
            gradient *= factor[:, None]
        return norms

    @cached_property  # every step asks
    def low_precision(self) -> bool:
        """Whether heads compute in bfloat16."""
        dtype = self.train.dtype
        return dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda" and has_bfloat16(self.device))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision)


def _logits_and_kept(head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and kept patches of psa, alone or inside a `Choice`, as from `PSA.answer`."""
    psa = unwrapped(head)
    assert isinstance(psa, PSA)
    logits, kept = psa.answer(batch)
    return (head.choose(logits, batch) if isinstance(head, Choice) else logits), kept


class _Caller(nn.Module):
    """Wraps a head so that `forward` calls any function of it, while `functional_call` substitutes its weights."""

    def __init__(self, head: nn.Module, call: Any) -> None:
        super().__init__()
        self.head = head
        self._call = call

    def forward(self) -> Any:
        with errors_kept(self.head):
            return self._call(self.head)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside the block, use operations with equal results from run to run; one without such a version is refused."""
    settings: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(before or enabled)
    # torch would also fill all memory that is about to be written, which takes time and helps only to find mistakes.
    settings.fill_uninitialized_memory = before and filled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
