"""Frames -> the normalised tensor that a network expects, on the CPU and without torchvision.

Shape legend: T frames, H x W pixels of a whole frame, h x w of the part that was cut out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from egopatch.extract.feed.clips import Cut
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform, Window


def crop_and_resize(
    frames: Sequence[NDArray[np.uint8]],
    size: int,
    transform: Transform = EGOVLP_TRANSFORM,
    cuts: Sequence[Cut] | None = None,
) -> Tensor:
    """Resize and crop frames, without normalisation, on one thread.

    No bit of the result depends on the pixels that the transform does not look at, or on the number of threads.

    Args:
        frames: T frames, each [H, W, 3] uint8, of any sizes; with `cuts` [h, w, 3].
        size: Side of the result in pixels.
        transform: Transform of the network.
        cuts: How each frame was cut to what the transform looks at; by default they are whole.

    Returns:
        float32 [T, 3, size, size] in [0, 1].
    """
    if cuts is None:
        cuts = [Cut(frame.shape[:2], Window(0, 0, *frame.shape[:2])) for frame in frames]
    results = torch.empty(len(frames), 3, size, size)
    whole_hwc = torch.empty(0)  # one frame's, so that all frames reuse the same few megabytes
    with _one_thread():
        for frame, cut, result in zip(frames, cuts, results, strict=True):
            # In its place in a frame of full size, because pixel positions round differently in a smaller one.
            if whole_hwc.shape != (*cut.whole, 3):
                whole_hwc = torch.zeros(*cut.whole, 3)
            part_hwc = whole_hwc[cut.window.rows, cut.window.columns]
            np.copyto(part_hwc.numpy(), frame)
            part_hwc.div_(255)
            # Channels stay last: the same bits as channels first, without a transposition and several times faster.
            whole_tchw = whole_hwc.permute(2, 0, 1)[None]
            resized_tchw = resize(whole_tchw, transform.resized(*cut.whole), transform)
            crop = transform.crop(*resized_tchw.shape[-2:])
            result.copy_(resize(resized_tchw[..., crop.rows, crop.columns], (size, size), transform)[0])
    return results


def to_input(
    frames: Sequence[NDArray[np.uint8]],
    size: int,
    transform: Transform = EGOVLP_TRANSFORM,
    cuts: Sequence[Cut] | None = None,
) -> Tensor:
    """The frames of `crop_and_resize`, normalised: float32 [T, 3, size, size]."""
    mean = torch.tensor(transform.mean).view(3, 1, 1)
    std = torch.tensor(transform.std).view(3, 1, 1)
    return crop_and_resize(frames, size, transform, cuts).sub_(mean).div_(std)


def resize(pixels_tchw: Tensor, target: tuple[int, int], transform: Transform) -> Tensor:
    """Resize float32 [T, C, H, W] to `target`, (height, width)."""
    if tuple(pixels_tchw.shape[-2:]) == target:
        return pixels_tchw
    mode, antialias = transform.resampling, transform.antialias
    resized = F.interpolate(pixels_tchw, size=target, mode=mode, align_corners=False, antialias=antialias)
    return resized.clamp_(0, 1) if mode == "bicubic" else resized  # cubic weights overshoot at edges


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch's operations in this thread: resizing rounds differently on several."""
    threads = torch.get_num_threads()
    if threads == 1:  # setting it again would empty caches of the encoder
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
