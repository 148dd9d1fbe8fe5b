"""Encoding on a GPU that never waits: copies in and out have streams of their own beside the computation's.

A clip's pixels are copied to the device as soon as it is decoded, from memory that the children have written them to;
so a batch is there when it is complete. On the CPU, whose streams do nothing, the same code runs in tests.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egopatch.extract.encoders import VideoEncoder
from egopatch.extract.errors import JobFailed
from egopatch.extract.feed.clips import Pixels, PreparedClip
from egopatch.extract.feed.on_device import DeviceTransform
from egopatch.extract.video.transforms import Transform
from egopatch.extract.worker.batch_encoder import BatchEncoder, Row
from egopatch.features.values.spec import StoredDtype

_COPYING = 8  # clips whose copies to the device may be on their way
_PINNED_STEP = 1 << 20


class DeviceEncoder(BatchEncoder):
    """See `BatchEncoder`; every batch has `batch` clips, so a short one repeats its last clip.

    Args: as for `BatchEncoder`, and
        transform: Transform of the network, applied to clips that come as pixels.
    """

    held = _COPYING

    def __init__(self, encoder: VideoEncoder, batch: int, dtype: StoredDtype, transform: Transform) -> None:
        super().__init__(encoder, batch, dtype)
        self._device = next(encoder.parameters()).device
        self._streams = torch.get_device_module(self._device)
        self._streams.set_device(self._device)  # pinned memory would otherwise come with a context on the first GPU
        self._compute = self._streams.current_stream(self._device)
        self._in, self._out = (torch.cuda.Stream(self._device) if self._on_cuda else torch.cpu.Stream() for _ in "io")
        self._transform = DeviceTransform(transform, encoder.size, self._device)
        self._pinned = _PinnedMemory() if self._on_cuda else None
        self._received: list[list[tuple[Tensor, Pixels | None]]] = []
        self._copying: deque[tuple[Any, PreparedClip]] = deque()

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._streams.synchronize(self._device)  # copies may still read memory that is about to be freed
        if self._pinned:
            self._pinned.release()

    def _receive(self, clip: PreparedClip) -> None:
        """Queue the copy of the frames to the device."""
        runs: list[tuple[NDArray, Pixels | None]]
        if isinstance(clip.frames, np.ndarray):
            runs = [(clip.frames, None)]
        else:
            runs = [(np.asarray(run.frames), run) for run in clip.frames]
        if self._pinned and clip.memory is not None:
            self._pinned.cover(clip.memory, clip.memory_used)
        copied = self._streams.Event()
        with self._streams.stream(self._in):
            here = [
                (torch.from_numpy(frames).to(self._device, non_blocking=True, copy=True), run) for frames, run in runs
            ]
            copied.record(self._in)
        self._received.append(here)
        self._copying.append((copied, clip))
        while self._copying and (len(self._copying) >= _COPYING or self._copying[0][0].query()):
            self._release_oldest()

    def _release_oldest(self) -> None:
        copied, clip = self._copying.popleft()
        copied.synchronize()
        clip.release()

    @torch.inference_mode()
    def _launch(self, clips: Sequence[PreparedClip]) -> Callable[[], list[Row]]:
        """Queue the transform and the encoding behind the copies in, and the copies out behind the encoding."""
        received, self._received = self._received, []
        self._compute.wait_stream(self._in)
        clock = _Clock(self._compute, self._on_cuda)
        # The tensors of `received` belong to the other stream's memory; `wait` below keeps them until it is unused.
        tokens = self._converted(self._encoder(self._transformed(received)))
        clock.stop()
        self._out.wait_stream(self._compute)
        # Waiting for it takes no core from the decoders.
        done: Any = torch.cuda.Event(blocking=True) if self._on_cuda else torch.cpu.Event()
        with self._streams.stream(self._out):
            # Pinned memory comes from torch, which uses it again once a shard is written and its rows are dropped.
            outputs = {name: torch.empty_like(t, device="cpu", pin_memory=self._on_cuda) for name, t in tokens.items()}
            for name, tensor in tokens.items():
                outputs[name].copy_(tensor, non_blocking=True)
            done.record(self._out)
        keep: list[object] = [received, tokens]

        def wait() -> list[Row]:
            done.synchronize()
            self.busy_s += clock.seconds()
            keep.clear()
            return [{name: tensor[i] for name, tensor in outputs.items()} for i in range(len(clips))]

        return wait

    def _transformed(self, received: Sequence[Sequence[tuple[Tensor, Pixels | None]]]) -> Tensor:
        """[size, T, 3, S, S], the encoder's input in its own type."""
        steps, side = self._encoder.num_frames, self._encoder.size
        dtype = next(self._encoder.parameters()).dtype
        frames_btchw = torch.empty((self.size, steps, 3, side, side), dtype=dtype, device=self._device)
        for i, runs in enumerate(received):
            first = 0
            for tensor, pixels in runs:
                target = frames_btchw[i, first : first + len(tensor)]
                if len(target) != len(tensor) or first + len(tensor) > steps:
                    raise ValueError(f"a clip has {first + len(tensor)} frames; this encoder takes {steps}")
                if pixels is None:
                    target.copy_(tensor)
                else:
                    self._transform.fill(target, tensor, pixels.whole, pixels.window)
                first += len(tensor)
        frames_btchw[len(received) :] = frames_btchw[len(received) - 1]
        return frames_btchw


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


class _PinnedMemory:
    """Slots that CUDA copies from directly: each is registered at its first use, and only as far as it was used.

    Registering takes the memory for good, and most slots would never be full.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def cover(self, memory: NDArray[np.uint8], used: int) -> None:
        """Register the first `used` bytes of a slot, unless this was done before.

        Raises:
            JobFailed: CUDA refuses.
        """
        address = memory.ctypes.data
        known = self._sizes.get(address, 0)
        if known >= used:
            return
        if known:
            self._release(address)
        size = min(-(-used // _PINNED_STEP) * _PINNED_STEP, memory.nbytes)
        self._require(torch.cuda.cudart().cudaHostRegister(address, size, 0), f"pin {size} bytes of shared memory")
        self._sizes[address] = size

    def release(self) -> None:
        """Undo all registrations."""
        for address in tuple(self._sizes):
            self._release(address)

    def _release(self, address: int) -> None:
        self._require(torch.cuda.cudart().cudaHostUnregister(address), "release pinned memory")
        del self._sizes[address]

    @staticmethod
    def _require(result: Any, what: str) -> None:
        if result != torch.cuda.cudart().cudaError.success:
            raise JobFailed(f"CUDA cannot {what} (error {int(result)}); free some memory and run the command again")
