"""A training step as a CUDA graph: the host launches all of its kernels at once.

A step of psa is some 400 kernels. A GPU computes them in a fourth of the time in which a host launches them one by one
(docs/kernels.md). A graph has fixed shapes and addresses: it works on batches that are padded to one shape, and reads
them from one place.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from egopatch.train.data.batch import Batch, Options

# Batches that are learned from before the capture, which may neither compile a kernel nor load one.
EAGER_BATCHES = 2
# Fields of a batch that are the same for all batches, or for the host alone.
UNCHANGED = ("stored", "derived", "rows")


class CapturedStep:
    """Calls `step`, which learns from a batch and returns a tensor; on a GPU by a CUDA graph, after the first batches.

    Args:
        step: What it does follows from the batch, and from tensors that stay where they are; it reads none of them
            back. Its numbers are those of its operations one by one.
    """

    def __init__(self, step: Callable[[Batch], Tensor]) -> None:
        self._step = step
        self._batches = 0
        self._captured: tuple[torch.cuda.CUDAGraph, Batch, Tensor] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The result of a step with the next batch; all batches are padded to one shape and read the same clips."""
        self._batches += 1
        if not batch.answers.is_cuda or self._batches <= EAGER_BATCHES:
            return self._step(batch)
        if self._captured is None:
            self._captured = self._capture(batch)
        graph, inputs, result = self._captured
        assert inputs.stored is batch.stored
        for own, new in zip(changing_tensors(inputs), changing_tensors(batch), strict=True):
            own.copy_(new)
        graph.replay()
        return result.clone()

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        inputs, graph = with_own_tensors(batch), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
            result = self._step(inputs)
        return graph, inputs, result


def with_own_tensors(batch: Batch) -> Batch:
    """The batch with copies of all tensors that differ between batches."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, Batch):
            return with_own_tensors(value)
        if isinstance(value, Options):
            return Options(**{field.name: getattr(value, field.name).clone() for field in fields(value)})
        return tuple(map(copied, value)) if isinstance(value, tuple) else value

    changing = [field.name for field in fields(batch) if field.name not in UNCHANGED]
    return replace(batch, **{name: copied(getattr(batch, name)) for name in changing})


def changing_tensors(batch: Batch | Options) -> Iterator[Tensor]:
    """The tensors on the batch's device that differ between batches, in a fixed order."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, Batch | Options):
                yield from changing_tensors(part)
            elif isinstance(part, Tensor) and field.name not in UNCHANGED:
                yield part
