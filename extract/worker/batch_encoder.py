"""Decoded clips -> rows of the store: on a GPU in batches of always one shape, on a CPU a clip a core.

A matrix product may round otherwise in another shape. So a clip's tokens must not depend on how many clips happened to
be encoded with it: a store that was interrupted, repaired or shared between jobs has the bits of an undisturbed one.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from egopatch.extract.encoders import VideoEncoder
from egopatch.extract.video.decode import PreparedClip
from egopatch.features import PatchTokens
from egopatch.features.values.spec import QUANTISED, StoredDtype, whole_dtype

Row = dict[str, Tensor]


class BatchEncoder:
    """Encodes batches of at most `size` clips; a context manager.

    Args:
        encoder: on its device, in evaluation mode.
        batch: clips to encode together; on a CPU at most as many as it has cores.
        dtype: name of the type that tokens are stored in.

    Attributes:
        size: clips to a batch.
        seconds: that this process was kept by encoding so far.
    """

    def __init__(self, encoder: VideoEncoder, batch: int, dtype: StoredDtype) -> None:
        self._encoder = encoder
        self._device = next(encoder.parameters()).device
        whole = getattr(torch, whole_dtype(dtype))
        # The store quantises, from all the bits that there are.
        self._dtypes = {"patches": torch.float32 if dtype in QUANTISED else whole, "coarse": whole}
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._threads = torch.get_num_threads()
        self.size = batch if self._copies else min(batch, self._threads)
        # Cores that share each operation wait for one another; a clip each, they need not.
        self._cores = ThreadPoolExecutor(
            self.size, "encoder", initializer=torch.set_num_threads, initargs=(max(self._threads // self.size, 1),)
        )
        encoder.pack()  # else each thread would, at its first clip
        self.seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._cores.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # of threads to come, which take over the last number set anywhere

    def start(self, clips: Sequence[PreparedClip]) -> Callable[[], dict[str, Row]]:
        """Begin to encode; the function that comes back waits for the rows, by clip id.

        The call returns at once, so that gathering and copies overlap with computing. A row is a clip's part of
        `PatchTokens` and its timestamps, on the CPU: cls [D], patches [T, N, D], saliency [T, N], timestamps [T] in
        seconds, coarse [T, M, E] and coarse_saliency [T, M] where the network has them.

        Raises:
            ValueError: frames of another shape than the encoder takes; on a CPU when the rows are waited for.
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
                one.clip.clip_id: row | {"timestamps": torch.from_numpy(one.timestamps)}
                for one, row in zip(clips, tokens, strict=True)
            }

        return finish

    def _on_cores(self, clips: Sequence[PreparedClip]) -> Callable[[], list[Row]]:
        """Queue the clips, each for the next core that is free."""

        @torch.inference_mode()
        def encode(one: PreparedClip) -> Row:
            tokens = self._converted(self._encoder(torch.from_numpy(one.frames)[None]))
            return {name: tensor[0] for name, tensor in tokens.items()}

        queued = [self._cores.submit(encode, one) for one in clips]
        return lambda: [row.result() for row in queued]

    @torch.inference_mode()
    def _on_cuda(self, clips: Sequence[PreparedClip]) -> Callable[[], list[Row]]:
        """Queue copy, encoding and copy back on two streams; the second is done when all is."""
        compute, copies = torch.cuda.current_stream(self._device), self._copies
        assert copies is not None
        # A short batch is filled up with its last clip, for the shape.
        filled = [*clips, *[clips[-1]] * (self.size - len(clips))]
        pinned_btchw = torch.stack([torch.from_numpy(one.frames) for one in filled]).pin_memory()
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
