"""Decoded clips -> rows of the store, in batches: the base of both ways of encoding, `on_cores` and `on_device`.

A matrix product may round differently in another shape, but a clip's tokens must not depend on the clips that are
encoded with it. So a store has the same bits whether one job wrote it, several jobs did, or it was repaired.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.encoders import VideoEncoder
from egopatch.extract.feed.clips import PreparedClip
from egopatch.features import PatchTokens
from egopatch.features.values.spec import QUANTISED, StoredDtype, unscaled_dtype

Row = dict[str, Tensor]


@dataclass(frozen=True)
class EncodedBatch:
    """The result of a batch.

    Attributes:
        rows: Id of a clip -> its tensors of `PatchTokens` and its timestamps, on the CPU: cls [D], patches [T, N, D],
            saliency [T, N], timestamps [T] in seconds, and coarse [T, M, E] and coarse_saliency [T, M] if the network
            has them.
        finite: Clips whose numbers in `rows` are known to be finite; the others have not been checked.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    finite: frozenset[str] = frozenset()


class BatchEncoder(ABC):
    """Encodes batches of at most `size` clips; a context manager.

    Args:
        encoder: Encoder on its device, in evaluation mode.
        size: Number of clips in a batch.
        dtype: Name of the type in which tokens are stored.

    Attributes:
        size: See above.
        held: Number of clips whose frames it may use at a time; each is released as soon as possible.
        slow_batches: Number of batches at the start that take longer than all others.
        seconds: Time that this process has spent so far on starting batches and on waiting for them.
        handover_s: Time that it has spent on taking clips.
        busy_s: Time for which the encoder has computed. A device's slow batches count like the mean of the others, so
            that a short job shows what a clip costs a long one.
        slots: Memory of all rows, if other processes can share it; None if only this process has it.
    """

    held: int
    slow_batches = 1
    slots: SharedSlots | None = None

    def __init__(self, encoder: VideoEncoder, size: int, dtype: StoredDtype) -> None:
        self._encoder = encoder
        whole = getattr(torch, unscaled_dtype(dtype))
        # The store quantises, so it receives full precision.
        self._dtypes = {"patches": torch.float32 if dtype in QUANTISED else whole, "coarse": whole}
        self._taken: list[PreparedClip] = []
        self.size = size
        self.seconds = 0.0
        self.handover_s = 0.0
        self.busy_s = 0.0

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def add(self, clip: PreparedClip) -> None:
        """Add a clip to the next batch, which must have room for it; if there is a device, its copy there starts.

        Raises:
            ValueError: The frames have the wrong shape for the encoder; on a CPU the function from `start` raises it.
        """
        assert len(self._taken) < self.size
        started = time.perf_counter()
        self._taken.append(clip)
        self._receive(clip)
        self.handover_s += time.perf_counter() - started

    def start(self) -> Callable[[], EncodedBatch]:
        """Begin to encode the clips that were added; the returned function waits for their rows.

        The call returns at once, so that gathering and copies overlap with computing.
        """
        clips, self._taken = self._taken, []
        if not clips:
            return EncodedBatch
        started = time.perf_counter()
        wait = self._launch(clips)
        self.seconds += time.perf_counter() - started

        def finish() -> EncodedBatch:
            waiting = time.perf_counter()
            tokens, finite = wait()
            self.seconds += time.perf_counter() - waiting
            rows, known = dict[str, Row](), set[str]()
            for prepared, row, is_finite in zip(clips, tokens, finite, strict=True):
                name, times = prepared.clip.clip_id, self._times(prepared)
                rows[name] = row | {"timestamps": times}
                if is_finite and np.isfinite(prepared.timestamps).all():
                    known.add(name)
            return EncodedBatch(rows, frozenset(known))

        return finish

    @abstractmethod
    def _receive(self, clip: PreparedClip) -> None:
        """Begin to bring the frames of `clip` to where they are encoded."""

    @abstractmethod
    def _launch(self, clips: Sequence[PreparedClip]) -> Callable[[], tuple[list[Row], list[bool]]]:
        """Begin to encode the clips that were received; the returned function waits for their rows, in order, and for
        whether each is known to be finite.
        """

    def _times(self, clip: PreparedClip) -> Tensor:
        """[T'] seconds; a position in time that covers several frames has the mean of theirs."""
        times = torch.from_numpy(clip.timestamps)
        steps = self._encoder.steps
        return times if len(times) == steps else reduce(times, "(t frames) -> t", "mean", t=steps)

    def _converted(self, tokens: PatchTokens) -> dict[str, Tensor]:
        return {name: t.to(self._dtypes.get(name, torch.float32), copy=True) for name, t in tokens.tensors().items()}
