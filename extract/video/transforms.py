"""Frames -> the normalised tensor that a network expects, without torchvision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Resampling = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Transform:
    """How frames are resized, cropped and normalised.

    Attributes:
        name: Name in the store's fingerprint; it must change whenever the arithmetic changes.
        short_side: Length to which the short side is resized first; None keeps it.
        share: Side of the centre square that is cropped, as a share of the short side; None keeps the whole frame,
            which is then squeezed into a square.
        mean, std: Mean and standard deviation of R, G and B in [0, 1].
        resampling: Filter of all resizing.
        antialias: Whether the filter grows with the reduction, as in Pillow; the published networks go without.
    """

    name: str
    short_side: int | None
    share: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: Resampling = "bilinear"
    antialias: bool = False


# The evaluation transform of EgoVLP and EgoVLPv2.
EGOVLP_TRANSFORM = Transform(
    "resize256-bilinear centercrop256 resize imagenet", 256, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)


def crop_and_resize(frames: Sequence[NDArray[np.uint8]], size: int, transform: Transform = EGOVLP_TRANSFORM) -> Tensor:
    """Resize and crop frames, without normalisation.

    Args:
        frames: T frames, each [H, W, 3] uint8. Those of another size than others are resized on their own.
        size: Side of the result in pixels.
        transform: Transform of the network.

    Returns:
        float32 [T, 3, size, size] in [0, 1].
    """
    if len({frame.shape for frame in frames}) > 1:
        return torch.cat([crop_and_resize([frame], size, transform) for frame in frames])
    # Copied to channel-first order first, because interpolation is several times slower on a strided view.
    pixels_tchw = torch.from_numpy(np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))).float().div_(255)
    height, width = pixels_tchw.shape[-2:]
    if transform.short_side is not None:
        pixels_tchw = _resize(pixels_tchw, _short_side(height, width, transform.short_side), transform)
    if transform.share is not None:
        side = round(transform.share * min(pixels_tchw.shape[-2:]))
        # Rounds half to even, as torchvision's CenterCrop.
        top, left = (round((extent - side) / 2.0) for extent in pixels_tchw.shape[-2:])
        pixels_tchw = pixels_tchw[..., top : top + side, left : left + side]
    return _resize(pixels_tchw, (size, size), transform)


def covered_box(height: int, width: int, transform: Transform = EGOVLP_TRANSFORM) -> tuple[float, float, float, float]:
    """The part of a frame that reaches the network: top, left, height, width in pixels of the frame.

    `features.to_pixels` lays values of patches over it.
    """
    target_height, target_width = height, width
    if transform.short_side is not None:
        target_height, target_width = _short_side(height, width, transform.short_side)
    if transform.share is None:
        return 0.0, 0.0, float(height), float(width)
    side = round(transform.share * min(target_height, target_width))
    down, across = height / target_height, width / target_width
    top, left = round((target_height - side) / 2.0), round((target_width - side) / 2.0)
    return top * down, left * across, side * down, side * across


def to_input(frames: Sequence[NDArray[np.uint8]], size: int, transform: Transform = EGOVLP_TRANSFORM) -> Tensor:
    """T frames, each [H, W, 3] uint8 -> normalised float32 [T, 3, size, size]."""
    mean = torch.tensor(transform.mean).view(3, 1, 1)
    std = torch.tensor(transform.std).view(3, 1, 1)
    return crop_and_resize(frames, size, transform).sub_(mean).div_(std)


def _short_side(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width once the short side is `short`; the long one is rounded down, as in torchvision's Resize."""
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def _resize(pixels_tchw: Tensor, target: tuple[int, int], transform: Transform) -> Tensor:
    if tuple(pixels_tchw.shape[-2:]) == target:
        return pixels_tchw
    mode, antialias = transform.resampling, transform.antialias
    resized = F.interpolate(pixels_tchw, size=target, mode=mode, align_corners=False, antialias=antialias)
    return resized.clamp_(0, 1) if mode == "bicubic" else resized  # cubic weights overshoot at edges
