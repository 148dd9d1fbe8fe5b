"""M heads of one shape, trained in lockstep: the parameters of all of them lie in tensors with the members first.

A head alone leaves most of a machine idle: its steps are many small operations. A stack runs each operation once for
all its members (`torch.vmap`), on tokens that are read once.

Shape legend: M members, B questions, T frames, N patches a frame, A answers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from egopatch.configs.schema import TrainConfig
from egopatch.train.data.batch import Batch
from egopatch.train.fitting.optim import build_optimiser, learning_rate
from egopatch.train.heads import PSA
from egopatch.train.heads.common.noise import Noise, mix
from egopatch.train.heads.psa.selection import Selection
from egopatch.train.processes.distributed import ALONE, Distributed

GRADIENT_NORM = 1.0
# Stands for the step in the keys of noise at evaluation.
ANSWERING = -1


class Stack:
    """Steps and answers of M heads.

    Args:
        heads: on `device`; alike but for their weights and the patches they keep. They are not used afterwards.
        seeds: of each member; decide its noise.
        train: hyper-parameters, but for the seed.
        steps: of the whole training; the schedule is spread over them.
        device: of the batches.
        ranks: that learn together, each from its share of a batch; their heads are equal, and stay so.

    Attributes:
        step: optimiser steps done.
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
        self._head = copy.deepcopy(heads[0])
        selections = [[m for m in head.modules() if isinstance(m, Selection)] for head in heads]
        for selection, *others in zip([m for m in self._head.modules() if isinstance(m, Selection)], *selections):
            selection.ks = tuple(other.ks[0] for other in others)
        noises = {name: module for name, module in self._head.named_modules() if isinstance(module, Noise)}
        self._noises = list(noises.values())
        # Members with one seed draw alike, so each draw is made once.
        draws = list(dict.fromkeys(self.seeds))
        own = torch.tensor([draws.index(seed) for seed in self.seeds], device=device)
        self._members = {f"{name}.member": own for name in noises}
        states = [head.state_dict() for head in heads]
        self.tensors = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self._learned = {name: p for name, p in heads[0].named_parameters() if p.requires_grad}
        for name in self._learned:
            self.tensors[name].requires_grad_()
        self.optimiser = build_optimiser([self.tensors[name] for name in self._learned], train)
        self._average = {name: self.tensors[name].detach().clone() for name in self._learned} if train.ema else {}
        self._held: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.seeds)

    def learn(self, batch: Batch, last: bool = False) -> list[dict[str, float]] | None:
        """Take in one batch; every `train.accumulate` batches, or at the `last` of an epoch, make a step.

        Returns:
            After a step `loss`, `lr` and `grad_norm` of each member.
        """
        assert self.optimiser is not None
        self._head.train()
        self._key(batch, self.step * self.train.accumulate + len(self._held))
        self._held.append(self._backward(batch))
        if not last and len(self._held) < self.train.accumulate:
            return None
        rate = learning_rate(self.step, self.steps, self.train)
        norms = self._clip(len(self._held))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for name, average in self._average.items():
            average.lerp_(self.tensors[name].detach(), 1 - self.train.ema)
        told = torch.stack(self._held).mean(dim=0)
        self._held = []
        self.step += 1
        return [
            {"loss": loss, "lr": rate, "grad_norm": norm}
            for loss, norm in zip(told.tolist(), norms.tolist(), strict=True)
        ]

    @torch.no_grad()
    def answer(self, batch: Batch, number: int) -> tuple[Tensor, Tensor | None]:
        """Classes [M, B] and psa's kept patches [M, B, T, N] bool for the batch of that `number`, on the CPU.

        The averaged weights answer where there are any. The same whenever asked, on however many ranks.
        """
        self._head.eval()
        self._key(batch, ANSWERING, number)
        tensors = {**self.tensors, **self._average}
        with self._autocast():
            if isinstance(self._head, PSA):
                logits, kept = self._each(lambda head: head.answer(batch), tensors)
                return logits.argmax(dim=-1).cpu(), kept.cpu()
            return self._each(lambda head: head(batch), tensors).argmax(dim=-1).cpu(), None

    def weights(self, member: int) -> dict[str, Tensor]:
        """What is evaluated and kept of one member, by the head's own names."""
        return {name: tensor[member].detach() for name, tensor in {**self.tensors, **self._average}.items()}

    @torch.no_grad()
    def load_weights(self, member: int, weights: Mapping[str, Tensor]) -> None:
        """Put `weights` in the place of one member's.

        Raises:
            ValueError: they are of another head.
        """
        if apart := sorted(weights.keys() ^ self.tensors.keys()):
            raise ValueError(f"{apart[0]} is on one side alone")
        for name, tensor in weights.items():
            if tensor.shape != self.tensors[name].shape[1:]:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(self.tensors[name].shape[1:])}")
            for place in (self.tensors, self._average):
                if name in place:
                    place[name][member].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on exactly here: tensors and plain values only."""
        return {
            "step": self.step,
            "tensors": {name: tensor.detach() for name, tensor in self.tensors.items()},
            "average": self._average,
            "optimiser": None if self.optimiser is None else self.optimiser.state_dict(),
            # Of batches taken in since the last step.
            "held": self._held,
            "gradients": {n: self.tensors[n].grad for n in self._learned if self.tensors[n].grad is not None},
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.step = state["step"]
        for name, tensor in state["tensors"].items():
            self.tensors[name].copy_(tensor)
        for name, tensor in state["average"].items():
            self._average[name].copy_(tensor)
        if self.optimiser is not None:
            self.optimiser.load_state_dict(state["optimiser"])
        self._held = [loss.to(self.device) for loss in state["held"]]
        for name, gradient in state["gradients"].items():
            self.tensors[name].grad = gradient.to(self.device)

    def _each(self, run: Any, tensors: Mapping[str, Tensor]) -> Any:
        """`run(head)` of every member; what it returns gains the members as first dimension."""
        caller = _Caller(self._head, run)
        named = {f"head.{name}": tensor for name, tensor in {**tensors, **self._members}.items()}
        if len(self) == 1:
            out = functional_call(caller, {name: tensor[0] for name, tensor in named.items()}, ())
            return tuple(part[None] for part in out) if isinstance(out, tuple) else out[None]
        # "same": what a head draws for all seeds is one tensor, of which each member takes its own.
        return torch.vmap(lambda own: functional_call(caller, own, ()), randomness="same")(named)

    def _backward(self, batch: Batch) -> Tensor:
        """Add the gradients of the batch, whatever ranks its questions are on; returns its losses, [M]."""
        parameters = [self.tensors[name] for name in self._learned]
        before = [parameter.grad for parameter in parameters]
        if self.ranks.size > 1:
            for parameter in parameters:
                parameter.grad = None
        losses = torch.zeros(len(self), device=self.device)
        if len(batch):
            own = self._losses(batch).sum(dim=1) / batch.total_questions
            own.sum().backward()
            losses = own.detach()
        if self.ranks.size > 1:
            total, *found = self.ranks.sum_tensors([losses, *(p.grad for p in parameters)], [losses, *parameters])
            assert total is not None
            losses = total
            for parameter, old, new in zip(parameters, before, found, strict=True):
                parameter.grad = new if old is None else old if new is None else old + new
        return losses

    def _losses(self, batch: Batch) -> Tensor:
        """Of each question, [M, B]."""
        with self._autocast():
            logits = self._each(lambda head: head(batch), self.tensors)
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1),
            batch.answers.repeat(len(self)),
            label_smoothing=self.train.label_smoothing,
            reduction="none",
        )
        return loss.view(len(self), -1)

    def _key(self, batch: Batch, *numbers: int) -> None:
        for place, noise in enumerate(self._noises):
            noise.keys = tuple(mix(seed, place, *numbers) for seed in dict.fromkeys(self.seeds))
            noise.part = None if batch.rank_slice is None else getattr(batch.rank_slice, noise.over)

    @torch.no_grad()
    def _clip(self, batches: int) -> Tensor:
        """Turn sums over `batches` into means and clip each member's gradient; returns the norms before, [M]."""
        gradients = [g for name in self._learned if (g := self.tensors[name].grad) is not None]
        each = [torch.linalg.vector_norm(gradient.reshape(len(self), -1), dim=1) for gradient in gradients]
        norms = torch.linalg.vector_norm(torch.stack(each), dim=0) / batches
        factor = (GRADIENT_NORM / (norms + 1e-6)).clamp(max=1) / batches
        for gradient in gradients:
            gradient *= factor.view(-1, *[1] * (gradient.ndim - 1))
        return norms

    def _autocast(self) -> torch.autocast:
        asked = self.train.dtype
        low = asked == "bfloat16" or (asked == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)


class _Caller(nn.Module):
    """A head whose `forward` is any function of it, so that `functional_call` can put other weights into it."""

    def __init__(self, head: nn.Module, run: Any) -> None:
        super().__init__()
        self.head = head
        self._run = run

    def forward(self) -> Any:
        return self._run(self.head)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Refuse operations whose results vary from run to run, inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
