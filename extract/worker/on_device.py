"""Encoding on a GPU that never waits: copies in and out run on their own streams beside the computation.

A clip's pixels are copied to the device as soon as the clip is decoded, from the memory that the children wrote them
to, so that a batch is on the device once it is complete. On the CPU, whose streams do nothing, tests run the same code.

Every call of torch costs this process some microseconds of Python; to keep up with a GPU it has about one millisecond a
clip. So clips of one size are copied side by side and transformed in one call.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egopatch.extract.encoders import VideoEncoder
from egopatch.extract.encoders.layers.graphs import EAGER_BATCHES, ReplayedEncoder, capture_cuda
from egopatch.extract.feed.clips import Cut, PreparedClip
from egopatch.extract.feed.on_device import DeviceTransform
from egopatch.extract.video.transforms import Transform
from egopatch.extract.worker.batch_encoder import BatchEncoder, Row
from egopatch.extract.worker.device import full_float32
from egopatch.extract.worker.pinned import PinnedSlots, pin_in_thread, unpin
from egopatch.extract.worker.results import ResultMemory
from egopatch.features.common.units import counted
from egopatch.features.values.spec import PatchTokens, StoredDtype

_FINITE = "finite"  # among the results of a batch, beside its tensors
_COPYING = 8  # clips whose copies to the device may be on their way
_MARKED = 4  # clips whose copies share one event
_SIDE_BY_SIDE = 4  # clips of one size that are transformed in one call,
_SMALL = 1 << 27  # if their float32 pixels have at most this many bytes; a larger clip keeps the GPU busy alone


@dataclass
class _Group:
    """Clips with frames of one size and kind, next to each other on the device.

    Attributes:
        pixels: uint8 [clips, F, ...], as in `Pixels`; the pixels of clips that never came are undefined.
        cut: How their frames were cut.
        places: Number of each clip in the batch.
    """

    pixels: Tensor
    cut: Cut
    places: list[int] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return len(self.places) == len(self.pixels)


@dataclass
class _Received:
    """Clips copied to the device for the next batch: in `groups`, or run by run in `others`.

    `others` holds a clip's place in the batch -> its runs, each with its cut, or None if it is finished input.
    """

    groups: list[_Group] = field(default_factory=list)
    others: dict[int, list[tuple[Tensor, Cut | None]]] = field(default_factory=dict)
    clips: int = 0


class DeviceEncoder(BatchEncoder):
    """See `BatchEncoder`; every batch has `batch` clips, so a short one repeats its last clip.

    Args:
        encoder: As for `BatchEncoder`.
        batch: Number of clips in every batch.
        dtype: As for `BatchEncoder`.
        transform: Transform of the network, applied to clips that come as pixels.
        batches: Number of batches whose rows may be in use at a time.
        capture: Whether the encoder may become a CUDA graph; a compiled one may not.
    """

    held = _COPYING
    slow_batches = EAGER_BATCHES  # the graph is made in the last of these

    def __init__(
        self,
        encoder: VideoEncoder,
        batch: int,
        dtype: StoredDtype,
        transform: Transform,
        batches: int,
        capture: bool = True,
    ) -> None:
        super().__init__(encoder, batch, dtype)
        self._device = next(encoder.parameters()).device
        self._backend = torch.get_device_module(self._device)  # torch.cuda or torch.cpu
        self._backend.set_device(self._device)  # otherwise pinning memory would start a context on the first GPU
        self._compute = self._backend.current_stream(self._device)
        self._in, self._out = (
            torch.cuda.Stream(self._device) if self._on_cuda else torch.cpu.Stream() for _ in range(2)
        )
        self._transform = DeviceTransform(transform, encoder.size, self._device)
        self._pinned_slots = PinnedSlots() if self._on_cuda else None
        pinning = (partial(pin_in_thread, self._device), unpin) if self._on_cuda else (_nothing, _nothing)
        self._results = ResultMemory(batches, batch * self._row_bytes(), *pinning)
        self.slots = self._results.slots
        self._frames: Tensor | None = None
        self._encode: Callable[[], PatchTokens] = self._encode_eagerly
        if self._on_cuda and capture:
            capturing = partial(capture_cuda, device=self._device)
            self._encode = ReplayedEncoder(self._encode_eagerly, capturing, partial(print, flush=True))
        self._received = _Received()
        self._unmarked: list[PreparedClip] = []
        self._copying: deque[tuple[Any, list[PreparedClip]]] = deque()
        self._batches, self._steady_s = 0, 0.0

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def __exit__(self, *_: object) -> None:
        self._backend.synchronize(self._device)  # copies may still read memory that is about to be freed
        del self._encode  # a reference cycle, which would keep the memory until a collection
        self._results.close()
        if self._pinned_slots:
            self._pinned_slots.release()

    def _row_bytes(self) -> int:
        """Bytes of what is copied for one clip: each array with its saliency, and whether all is finite."""
        encoder = self._encoder
        fine = prod(encoder.grid) * (encoder.width * self._dtypes["patches"].itemsize + 4)
        width = encoder.coarse_width or encoder.width
        coarse = (encoder.coarse or 0) * (width * self._dtypes["coarse"].itemsize + 4)
        return encoder.steps * (fine + coarse) + 4 * encoder.width + 1

    def _receive(self, clip: PreparedClip) -> None:
        """Queue the copy of the frames to the device."""
        if self._pinned_slots and clip.memory is not None:
            self._pinned_slots.cover(clip.memory, clip.memory_used)
        received, place = self._received, self._received.clips
        with self._backend.stream(self._in):
            if isinstance(clip.frames, tuple) and len(clip.frames) == 1:
                run = clip.frames[0]
                frames = torch.from_numpy(np.asarray(run.frames))
                self._require_frames(len(frames))
                group = self._group_for(frames, run.cut)
                group.pixels[len(group.places)].copy_(frames, non_blocking=True)
                group.places.append(place)
            else:
                runs: list[tuple[NDArray, Cut | None]] = (
                    [(clip.frames, None)]
                    if isinstance(clip.frames, np.ndarray)
                    else [(np.asarray(run.frames), run.cut) for run in clip.frames]
                )
                self._require_frames(sum(len(frames) for frames, _ in runs))
                received.others[place] = [
                    (torch.from_numpy(frames).to(self._device, non_blocking=True, copy=True), cut)
                    for frames, cut in runs
                ]
        received.clips += 1
        self._unmarked.append(clip)
        if len(self._unmarked) == _MARKED:
            self._mark()
        while self._copying and (self._held() >= _COPYING or self._copying[0][0].query()):
            self._release_oldest()

    def _require_frames(self, count: int) -> None:
        if count != self._encoder.num_frames:
            raise ValueError(f"a clip has {counted(count, 'frame')}; this encoder takes {self._encoder.num_frames}")

    def _group_for(self, frames: Tensor, cut: Cut) -> _Group:
        """A group with room for these frames."""
        for group in reversed(self._received.groups):
            if (group.pixels.shape[1:], group.cut) == (frames.shape, cut):
                if group.is_full:
                    break
                return group
        # The number depends only on the size, so that a clip's bits do not depend on other clips.
        window = cut.window
        count = min(_SIDE_BY_SIDE, max(_SMALL // (4 * len(frames) * 3 * window.height * window.width), 1))
        pixels = torch.empty((count, *frames.shape), dtype=torch.uint8, device=self._device)
        self._received.groups.append(_Group(pixels, cut))
        return self._received.groups[-1]

    def _held(self) -> int:
        return len(self._unmarked) + sum(len(clips) for _, clips in self._copying)

    def _event(self) -> Any:
        """An event for which waiting takes no core from the decoders."""
        return torch.cuda.Event(blocking=True) if self._on_cuda else torch.cpu.Event()

    def _mark(self) -> None:
        """Record an event behind the copies of all clips so far."""
        copied = self._event()
        copied.record(self._in)
        self._copying.append((copied, self._unmarked))
        self._unmarked = []

    def _release_oldest(self) -> None:
        copied, clips = self._copying.popleft()
        copied.synchronize()
        for clip in clips:
            clip.release()

    @torch.inference_mode()
    def _launch(self, clips: Sequence[PreparedClip]) -> Callable[[], tuple[list[Row], list[bool]]]:
        """Queue the transform and the encoding behind the copies in, and the copies out behind the encoding."""
        received, self._received = self._received, _Received()
        if self._unmarked:
            self._mark()
        self._compute.wait_stream(self._in)
        clock = _Clock(self._compute, self._on_cuda)
        # The tensors of `received` belong to the other stream's memory; `wait` below keeps them until it is unused.
        with full_float32():
            self._transform_all(received)
            tokens = self._converted(self._encode())  # copies: the next batch may replace the encoder's
        results = tokens | {_FINITE: _rows_finite(tokens.values())}
        clock.stop()
        self._out.wait_stream(self._compute)
        done = self._event()
        outputs = self._results.empty_like(results)
        with self._backend.stream(self._out):
            for name, tensor in results.items():
                outputs[name].copy_(tensor, non_blocking=True)
            done.record(self._out)
        keep: list[object] = [received, results]

        def wait() -> tuple[list[Row], list[bool]]:
            done.synchronize()
            self._count(clock.seconds())
            keep.clear()
            while self._copying and self._copying[0][0].query():
                self._release_oldest()
            rows = [{name: outputs[name][i] for name in tokens} for i in range(len(clips))]
            return rows, outputs[_FINITE][: len(clips)].tolist()

        return wait

    def _count(self, seconds: float) -> None:
        """Add a batch to `busy_s`; once there are others, the slow batches count like the mean of these."""
        self._batches += 1
        if (steady := self._batches - self.slow_batches) > 0:
            self._steady_s += seconds
            self.busy_s = self._steady_s * self._batches / steady
        else:
            self.busy_s += seconds

    def _encode_eagerly(self) -> PatchTokens:
        assert self._frames is not None
        return self._encoder(self._frames)

    def _transform_all(self, received: _Received) -> None:
        """Fill the encoder's input, [size, T, 3, S, S] in its own type; the previous batch has been encoded by then."""
        steps, side = self._encoder.num_frames, self._encoder.size
        if self._frames is None:
            dtype = next(self._encoder.parameters()).dtype
            self._frames = torch.empty((self.size, steps, 3, side, side), dtype=dtype, device=self._device)
        frames_btchw = self._frames
        for group in received.groups:
            inputs = self._transform(group.pixels.flatten(0, 1), group.cut).view(-1, steps, 3, side, side)
            first, count = group.places[0], len(group.places)
            if group.places == list(range(first, first + count)):
                frames_btchw[first : first + count] = inputs[:count]
            else:
                for number, place in enumerate(group.places):
                    frames_btchw[place] = inputs[number]
        for place, runs in received.others.items():
            first = 0
            for tensor, cut in runs:
                target = frames_btchw[place, first : first + len(tensor)]
                target.copy_(tensor if cut is None else self._transform(tensor, cut))
                first += len(tensor)
        frames_btchw[received.clips :] = frames_btchw[received.clips - 1]


def _rows_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Bool [rows]: whether all numbers of a row are finite, in one pass over each tensor; `isfinite` would take four.

    A core of the host would take longer for this check than for a checksum of the row.
    """
    extremes = [extreme for tensor in tensors for extreme in tensor.flatten(1).aminmax(dim=1)]
    return torch.stack([extreme.isfinite() for extreme in extremes]).all(dim=0)


class _Clock:
    """Time between two places in a stream of work; on the CPU, where work is done at once, between two calls."""

    def __init__(self, stream: Any, on_cuda: bool) -> None:
        self._stream = stream
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_cuda else []
        self._times: list[float] = []
        self._mark(0)

    def stop(self) -> None:
        """Mark the second place."""
        self._mark(1)

    def seconds(self) -> float:
        """The time, once the work is done."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]

    def _mark(self, number: int) -> None:
        if self._events:
            self._events[number].record(self._stream)
        else:
            self._times.append(time.perf_counter())


def _nothing(_: NDArray[np.uint8]) -> None:
    """Memory needs no pinning where the device is the CPU."""
