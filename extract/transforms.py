"""Frames -> the normalised tensor that the published networks were trained on.

Resize the short side to 256 (bilinear, no antialiasing), crop the centre 256x256, resize to the input size, normalise
with ImageNet's mean and deviation: the evaluation transform of EgoVLP and EgoVLPv2, without torchvision.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SHORT_SIDE = 256
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Part of a store's fingerprint: change it with the arithmetic below.
TRANSFORM = f"resize{SHORT_SIDE}-bilinear centercrop{SHORT_SIDE} resize imagenet"


def crop_and_resize(frames: NDArray[np.uint8], size: int) -> Tensor:
    """What the network looks at, before normalisation.

    Args:
        frames: [T, H, W, 3] uint8.
        size: side of the result in pixels.

    Returns:
        float32 [T, 3, size, size] in [0, 1].
    """
    # Copied into channel-first order first: interpolation is several times slower on a strided view.
    pixels_tchw = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float().div_(255)
    height, width = pixels_tchw.shape[-2:]
    # The short side is exact and the long one is cut down, as torchvision's Resize(int) does.
    if height <= width:
        target = (SHORT_SIDE, int(SHORT_SIDE * width / height))
    else:
        target = (int(SHORT_SIDE * height / width), SHORT_SIDE)
    if target != (height, width):
        pixels_tchw = _resize(pixels_tchw, target)
    # torchvision's CenterCrop rounds half to even.
    top, left = (round((side - SHORT_SIDE) / 2.0) for side in pixels_tchw.shape[-2:])
    pixels_tchw = pixels_tchw[..., top : top + SHORT_SIDE, left : left + SHORT_SIDE]
    return _resize(pixels_tchw, (size, size)) if size != SHORT_SIDE else pixels_tchw


def to_input(frames: NDArray[np.uint8], size: int) -> Tensor:
    """[T, H, W, 3] uint8 -> normalised float32 [T, 3, size, size]."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return crop_and_resize(frames, size).sub_(mean).div_(std)


def _resize(pixels_tchw: Tensor, target: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels_tchw, size=target, mode="bilinear", align_corners=False, antialias=False)
