"""A training step as a CUDA graph: the host launches all of its kernels at once.

A step of psa is some 360 kernels. Launching them one by one takes the host seven times as long as they take the GPU
(docs/kernels.md). A graph has fixed shapes and addresses: it works on batches that are padded to one shape, and reads
them from one place.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from egopatch.extract.encoders.layers.graphs import capture_cause, capture_cuda, capture_failure
from egopatch.features.common.os_errors import gpu_shortage
from egopatch.train.data.batch import Batch, Options
from egopatch.train.rundir.run_folder import RunError

# Batches that are learned from before the capture, during which no kernel may be compiled or loaded.
EAGER_BATCHES = 2
# Fields of a batch that are the same for all batches, or for the host alone.
UNCHANGED = ("stored", "derived", "rows")


class CapturedStep:
    """Runs a step that learns from a batch and returns a tensor; on a GPU as a CUDA graph, after the first batches.

    The step must depend only on the batch and on tensors that stay at their addresses, and read none of them back.
    Its results equal those of its operations launched one by one.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._captured: tuple[Callable[[], Tensor], Batch] | None = None

    def run(self, step: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Run `step` on the next batch; returns its result.

        Args:
            step: The step, the same in each call.
            batch: All batches are padded to one shape and read the same clips.

        Raises:
            RunError: The step cannot be captured.
        """
        self._batches += 1
        if not batch.answers.is_cuda or self._batches <= EAGER_BATCHES:
            return step(batch)
        if self._captured is None:
            self._captured = _capture(step, batch)
        replay, inputs = self._captured
        assert inputs.stored is batch.stored
        for own, new in zip(changing_tensors(inputs), changing_tensors(batch), strict=True):
            own.copy_(new)
        return replay().clone()

    def release(self) -> None:
        """Free the graph's memory: that of a whole step, in addition to the memory of all other work."""
        self._captured = None


def _capture(step: Callable[[Batch], Tensor], batch: Batch) -> tuple[Callable[[], Tensor], Batch]:
    """The function that replays the step, and the batch that it reads."""
    inputs = with_own_tensors(batch)
    try:
        return capture_cuda(partial(step, inputs), batch.answers.device), inputs
    except RuntimeError as error:  # torch has no type of its own for an operation that cannot be captured
        if gpu_shortage(cause := capture_cause(error)):
            raise cause from None
        raise RunError(
            f"the training step cannot become a CUDA graph ({capture_failure(error)}); for a head from outside, set "
            "Head.captures to false; for any other, use --train.residency ram"
        ) from error


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
