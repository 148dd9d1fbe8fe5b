"""Decoded clips -> rows of the store, in batches of always one shape.

A matrix product may round otherwise in another shape. So a clip's tokens must not depend on how many clips happened to
be encoded with it: a store that was interrupted, repaired or shared between jobs has the bits of an undisturbed one.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from extract.decode import PreparedClip
from extract.encoders import VideoEncoder
from features import PatchTokens
from features.spec import QUANTISED, StoredDtype, whole_dtype

Row = dict[str, Tensor]

# A CPU gains nothing from larger batches, and a short one, filled up, costs it dearly.
CPU_BATCH = 4


class BatchEncoder:
    """Encodes batches of at most `size` clips.

    Args:
        encoder: on its device, in evaluation mode.
        batch: clips to encode together; on a CPU at most `CPU_BATCH`.
        dtype: name of the type that tokens are stored in.

    Attributes:
        size: clips to a batch.
        seconds: that this process spent on encoding so far.
    """

    def __init__(self, encoder: VideoEncoder, batch: int, dtype: StoredDtype) -> None:
        self._encoder = encoder
        self._device = next(encoder.parameters()).device
        whole = getattr(torch, whole_dtype(dtype))
        # The store quantises, from all the bits that there are.
        self._dtypes = {"patches": torch.float32 if dtype in QUANTISED else whole, "coarse": whole}
        self._cuda = self._device.type == "cuda"
        self._copies = torch.cuda.Stream(self._device) if self._cuda else None
        self.size = batch if self._cuda else min(batch, CPU_BATCH)
        self.seconds = 0.0

    def start(self, clips: Sequence[PreparedClip]) -> Callable[[], dict[str, Row]]:
        """Begin to encode; the function that comes back waits for the rows, by clip id.

        On a GPU the call returns at once, so that copies and gathering overlap with computing.
        """
        if not clips:
            return dict
        started = time.perf_counter()
        # A short batch is filled up with its last clip, for the shape.
        filled = [*clips, *[clips[-1]] * (self.size - len(clips))]
        frames_btchw = torch.stack([torch.from_numpy(one.frames) for one in filled])
        with torch.inference_mode():
            outputs = self._on_cuda(frames_btchw) if self._cuda else self._converted(self._encoder(frames_btchw))
        done = torch.cuda.Event() if self._cuda else None
        if done and self._copies:
            done.record(self._copies)
        self.seconds += time.perf_counter() - started

        def finish() -> dict[str, Row]:
            waiting = time.perf_counter()
            if done:
                done.synchronize()
            self.seconds += time.perf_counter() - waiting
            return {
                one.clip.clip_id: {name: tensor[i] for name, tensor in outputs.items()}
                | {"timestamps": torch.from_numpy(one.timestamps)}
                for i, one in enumerate(clips)
            }

        return finish

    def _on_cuda(self, frames_btchw: Tensor) -> dict[str, Tensor]:
        """Queue copy, encoding and copy back on two streams; the second is done when all is."""
        compute, copies = torch.cuda.current_stream(self._device), self._copies
        assert copies is not None
        pinned_btchw = frames_btchw.pin_memory()
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
        return outputs

    def _converted(self, tokens: PatchTokens) -> dict[str, Tensor]:
        return {name: t.to(self._dtypes.get(name, torch.float32)) for name, t in tokens.tensors().items()}
