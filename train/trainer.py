"""One head in training: its weights, optimiser and random numbers. The loop around it is in `run.py` and `sweep.py`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.schema import TrainConfig
from train.batches import NO_CLASS, Batch, Features, QuestionTable, plan_batches
from train.heads import PSA, Majority
from train.heads.question import QuestionReader
from train.optim import build_optimiser, learning_rate

GRADIENT_NORM = 1.0
# Clips that the input whitening is measured on.
MEASURED_CLIPS = 256


@dataclass(frozen=True)
class Answers:
    """What a head says.

    Attributes:
        classes: [Q] predicted class of each question of a table.
        kept: [Q, T, k] int16, the patches that psa kept; None for other heads.
    """

    classes: Tensor
    kept: np.ndarray | None


class Trainer:
    """Steps and predictions of one head. Has random numbers of its own, so that several can share a loop.

    Args:
        head: on `device`.
        train: hyper-parameters; `train.seed` starts the dropout.
        steps: of the whole training; the schedule is spread over them.
        device: of the batches.
    """

    def __init__(self, head: nn.Module, train: TrainConfig, steps: int, device: torch.device) -> None:
        self.head = head
        self.train = train
        self.steps = steps
        self.device = device
        self.step = 0
        self.optimiser = build_optimiser(head, train) if any(p.requires_grad for p in head.parameters()) else None
        with _random_state(device, train.seed):
            self._random = _get_random(device)

    def learn(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns its `loss`, `lr` and `grad_norm`."""
        assert self.optimiser is not None
        rate = learning_rate(self.step, self.steps, self.train)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.head.train()
        with _random_state(self.device, self._random), self._autocast():
            logits = self.head(batch)
            self._random = _get_random(self.device)
        loss = functional.cross_entropy(
            logits.float(), batch.answers, ignore_index=NO_CLASS, label_smoothing=self.train.label_smoothing
        )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.head.parameters(), GRADIENT_NORM)
        self.optimiser.step()
        self.step += 1
        return {"loss": loss.item(), "lr": rate, "grad_norm": float(norm)}

    @torch.no_grad()
    def answer(self, batch: Batch, number: int) -> tuple[Tensor, Tensor | None]:
        """Classes [B] and psa's kept patches [B, T, k] for the batch of that `number`; the same whenever asked."""
        self.head.eval()
        with _random_state(self.device, number), self._autocast():
            if isinstance(self.head, PSA):
                logits, kept = self.head.answer(batch)
                return logits.argmax(dim=-1).cpu(), kept.cpu()
            return self.head(batch).argmax(dim=-1).cpu(), None

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on exactly here: tensors and plain values only."""
        optimiser = None if self.optimiser is None else self.optimiser.state_dict()
        return {"step": self.step, "head": self.head.state_dict(), "optimiser": optimiser, "random": self._random}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.step = state["step"]
        self.head.load_state_dict(state["head"])
        if self.optimiser is not None:
            self.optimiser.load_state_dict(state["optimiser"])
        self._random = [part.cpu() for part in state["random"]]

    def _autocast(self) -> torch.autocast:
        asked = self.train.dtype
        low = asked == "bfloat16" or (asked == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)


def answer_table(trainers: Sequence[Trainer], features: Features, table: QuestionTable, size: int) -> list[Answers]:
    """What each of `trainers` answers to every question of `table`, whose clips are all encoded, on one reading."""
    classes = [torch.zeros(len(table), dtype=torch.long) for _ in trainers]
    kept: list[np.ndarray | None] = [None for _ in trainers]
    plan = plan_batches(table, size, seed=None)
    for number, batch in enumerate(features.stream(table, plan)):
        for index, trainer in enumerate(trainers):
            classes[index][batch.rows], chosen = trainer.answer(batch, number)
            if chosen is None:
                continue
            whole = kept[index]
            if whole is None:
                whole = kept[index] = np.zeros((len(table), *chosen.shape[1:]), dtype=np.int16)
            whole[batch.rows.numpy()] = chosen.numpy()
    return [Answers(*pair) for pair in zip(classes, kept, strict=True)]


def prepare(head: nn.Module, features: Features, table: QuestionTable) -> None:
    """What a head takes from the training questions before the first step: answer counts, whitening of its inputs."""
    if isinstance(head, Majority):
        head.count(table)
    for module in head.modules():
        if isinstance(module, QuestionReader):
            module.whiten.measure(features.words(table))
    measure = getattr(head, "measure", None)
    if measure is not None:
        stride = max(1, len(table.clips) // MEASURED_CLIPS)
        measure(features.tokens(table.clips[::stride][:MEASURED_CLIPS]))


def _get_random(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _random_state(device: torch.device, start: int | list[Tensor]) -> Iterator[None]:
    """Random numbers from a seed or a saved state inside the block; those of everybody else go on untouched after."""
    before = _get_random(device)
    try:
        if isinstance(start, int):
            torch.manual_seed(start)
        else:
            _set_random(device, start)
        yield
    finally:
        _set_random(device, before)
