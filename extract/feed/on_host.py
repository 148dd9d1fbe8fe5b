"""Frames -> the normalised tensor that a network expects, on the CPU and without torchvision."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform


def crop_and_resize(frames: Sequence[NDArray[np.uint8]], size: int, transform: Transform = EGOVLP_TRANSFORM) -> Tensor:
    """Resize and crop frames, without normalisation.

    Args:
        frames: T frames, each [H, W, 3] uint8, of any sizes.
        size: Side of the result in pixels.
        transform: Transform of the network.

    Returns:
        float32 [T, 3, size, size] in [0, 1].
    """
    results = torch.empty(len(frames), 3, size, size)
    whole_tchw = torch.empty(0)  # one frame's, so that all frames reuse the same few megabytes
    for frame, result in zip(frames, results, strict=True):
        # Copied to channel-first order first, because interpolation is several times slower on a strided view.
        pixels_tchw = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))[None]
        if whole_tchw.shape != pixels_tchw.shape:
            whole_tchw = torch.empty(pixels_tchw.shape)
        whole_tchw.copy_(pixels_tchw).div_(255)
        resized_tchw = resize(whole_tchw, transform.resized(*whole_tchw.shape[-2:]), transform)
        crop = transform.crop(*resized_tchw.shape[-2:])
        seen_tchw = resized_tchw[..., crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        result.copy_(resize(seen_tchw, (size, size), transform)[0])
    return results


def to_input(frames: Sequence[NDArray[np.uint8]], size: int, transform: Transform = EGOVLP_TRANSFORM) -> Tensor:
    """T frames, each [H, W, 3] uint8 -> normalised float32 [T, 3, size, size]."""
    mean = torch.tensor(transform.mean).view(3, 1, 1)
    std = torch.tensor(transform.std).view(3, 1, 1)
    return crop_and_resize(frames, size, transform).sub_(mean).div_(std)


def resize(pixels_tchw: Tensor, target: tuple[int, int], transform: Transform) -> Tensor:
    """Resize float32 [T, C, H, W] to `target`, (height, width)."""
    if tuple(pixels_tchw.shape[-2:]) == target:
        return pixels_tchw
    mode, antialias = transform.resampling, transform.antialias
    resized = F.interpolate(pixels_tchw, size=target, mode=mode, align_corners=False, antialias=antialias)
    return resized.clamp_(0, 1) if mode == "bicubic" else resized  # cubic weights overshoot at edges
