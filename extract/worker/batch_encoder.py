"""Decoded clips -> rows of the store: on a GPU in batches of one fixed shape, on a CPU one clip per core.

A matrix product may round differently in another shape, but a clip's tokens must not depend on the clips that are
encoded with it. So a store has the same bits whether one job wrote it, several jobs did, or it was repaired.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from einops import reduce
from torch import Tensor

from egopatch.extract.encoders import VideoEncoder
from egopatch.extract.video.decode import PreparedClip
from egopatch.features import PatchTokens
from egopatch.features.values.spec import QUANTISED, StoredDtype, unscaled_dtype

Row = dict[str, Tensor]


class BatchEncoder:
    """Encodes batches of at most `size` clips; a context manager.

    Args:
        encoder: Encoder on its device, in evaluation mode.
        batch: Number of clips to encode together; on a CPU at most one per core.
        dtype: Name of the type in which tokens are stored.

    Attributes:
        size: Number of clips in a batch.
        seconds: Time that this process has spent on encoding so far.
    """

    def __init__(self, encoder: VideoEncoder, batch: int, dtype: StoredDtype) -> None:
        self._encoder = encoder
        self._device = next(encoder.parameters()).device
        whole = getattr(torch, unscaled_dtype(dtype))
        # The store quantises, so it receives full precision.
        self._dtypes = {"patches": torch.float32 if dtype in QUANTISED else whole, "coarse": whole}
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._threads = torch.get_num_threads()
        self.size = batch if self._copies else min(batch, self._threads)
        # Cores that share every operation wait for one another; with one clip per core they do not.
        self._cores = ThreadPoolExecutor(
            self.size, "encoder", initializer=torch.set_num_threads, initargs=(max(self._threads // self.size, 1),)
        )
        encoder.pack()  # otherwise each thread would, at its first clip
        self.seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._cores.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # new threads inherit the number that was set last, in any thread

    def start(self, clips: Sequence[PreparedClip]) -> Callable[[], dict[str, Row]]:
        """Begin to encode `clips`; the returned function waits for their rows and returns them by clip id.

        The call returns at once, so that gathering and copies overlap with computing. A row holds the clip's tensors of
        `PatchTokens` and its timestamps, on the CPU: cls [D], patches [T, N, D], saliency [T, N], timestamps [T] in
        seconds, and coarse [T, M, E] and coarse_saliency [T, M] if the network has them.

        Raises:
            ValueError: The frames have the wrong shape for the encoder; on a CPU the returned function raises it.
        """
        if not clips:
            return dict
        started = time.perf_counter()
        wait = self._on_cuda(clips) if self._copies else self._on_cores(clips)
        self.seconds += time.perf_counter() - started

        def finish() -> dict[str, Row]:
            waiting = time.perf_counter()
            tokens = wait()
            self.seconds += time.perf_counter() - waiting
            return {
                prepared.clip.clip_id: row | {"timestamps": self._times(prepared)}
                for prepared, row in zip(clips, tokens, strict=True)
            }

        return finish

    def _times(self, clip: PreparedClip) -> Tensor:
        """[T'] seconds; a position in time that covers several frames has the mean of theirs."""
        times = torch.from_numpy(clip.timestamps)
        steps = self._encoder.steps
        return times if len(times) == steps else reduce(times, "(t frames) -> t", "mean", t=steps)

    def _on_cores(self, clips: Sequence[PreparedClip]) -> Callable[[], list[Row]]:
        """Queue the clips; each goes to the next free core."""

        @torch.inference_mode()
        def encode(clip: PreparedClip) -> Row:
            tokens = self._converted(self._encoder(torch.from_numpy(clip.frames)[None]))
            return {name: tensor[0] for name, tensor in tokens.items()}

        queued = [self._cores.submit(encode, clip) for clip in clips]
        return lambda: [row.result() for row in queued]

    @torch.inference_mode()
    def _on_cuda(self, clips: Sequence[PreparedClip]) -> Callable[[], list[Row]]:
        """Queue the copy to the device, the encoding and the copy back on two streams; the copy back ends last."""
        compute, copies = torch.cuda.current_stream(self._device), self._copies
        assert copies is not None
        # A short batch repeats its last clip, to keep the shape.
        filled = [*clips, *[clips[-1]] * (self.size - len(clips))]
        pinned_btchw = torch.stack([torch.from_numpy(clip.frames) for clip in filled]).pin_memory()
        with torch.cuda.stream(copies):
            frames_btchw = pinned_btchw.to(self._device, non_blocking=True)
        compute.wait_stream(copies)
        frames_btchw.record_stream(compute)
        tokens = self._converted(self._encoder(frames_btchw))
        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            outputs = {name: torch.empty_like(t, device="cpu", pin_memory=True) for name, t in tokens.items()}
            for name, tensor in tokens.items():
                outputs[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(copies)
        done = torch.cuda.Event()
        done.record(copies)

        def wait() -> list[Row]:
            done.synchronize()
            return [{name: tensor[i] for name, tensor in outputs.items()} for i in range(len(clips))]

        return wait

    def _converted(self, tokens: PatchTokens) -> dict[str, Tensor]:
        return {name: t.to(self._dtypes.get(name, torch.float32)) for name, t in tokens.tensors().items()}
