"""Encoding on a CPU: one clip per core."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from egopatch.extract.encoders import VideoEncoder
from egopatch.extract.feed.clips import Frames, PreparedClip, frames_and_cuts
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.transforms import Transform
from egopatch.extract.worker.batch_encoder import BatchEncoder, Row
from egopatch.features.values.spec import StoredDtype


class CoreEncoder(BatchEncoder):
    """See `BatchEncoder`; `batch` is cut to the number of cores. Cores also transform the frames.

    Args:
        encoder: As for `BatchEncoder`.
        batch: Largest number of clips that are encoded at a time.
        dtype: As for `BatchEncoder`.
        transform: Transform of the network.
    """

    def __init__(self, encoder: VideoEncoder, batch: int, dtype: StoredDtype, transform: Transform) -> None:
        self._transform = transform
        self._threads = torch.get_num_threads()
        super().__init__(encoder, min(batch, self._threads), dtype)
        self.held = 2 * self.size  # one batch is gathered while another one is encoded
        # Cores that share every operation wait for one another; with one clip per core they do not.
        self._cores = ThreadPoolExecutor(
            self.size, "encoder", initializer=torch.set_num_threads, initargs=(max(self._threads // self.size, 1),)
        )
        encoder.pack()  # otherwise each thread would pack it at its first clip

    def __exit__(self, *_: object) -> None:
        self._cores.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # new threads inherit the number that was set last, in any thread

    def _receive(self, clip: PreparedClip) -> None:
        """Nothing: cores read the shared memory themselves."""

    def _input(self, frames: Frames) -> Tensor:
        """[T, 3, S, S] from pixels, or as a child has transformed them."""
        if isinstance(frames, np.ndarray):
            return torch.from_numpy(frames)
        pixels, cuts = frames_and_cuts(frames)
        return to_input(pixels, self._encoder.size, self._transform, cuts)

    def _launch(self, clips: Sequence[PreparedClip]) -> Callable[[], tuple[list[Row], list[bool]]]:
        """Queue the clips; each goes to the next free core. Only the writer checks whether they are finite."""

        @torch.inference_mode()
        def encode(clip: PreparedClip) -> tuple[Row, float]:
            started = time.perf_counter()
            try:
                # What the encoder returns may be memory that it, or another clip's frames, use again.
                tokens = self._converted(self._encoder(self._input(clip.frames)[None]))
            finally:
                clip.release()
            return {name: tensor[0] for name, tensor in tokens.items()}, time.perf_counter() - started

        queued = [self._cores.submit(encode, clip) for clip in clips]

        def wait() -> tuple[list[Row], list[bool]]:
            results = [future.result() for future in queued]
            self.busy_s += sum(seconds for _, seconds in results) / self.size
            return [row for row, _ in results], [False] * len(results)

        return wait
