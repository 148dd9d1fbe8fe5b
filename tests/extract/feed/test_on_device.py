"""A device computes from cut pixels the same input that the CPU computes from whole frames."""

import itertools

import numpy as np
import pytest
import torch

from egopatch.extract.encoders.networks import lite
from egopatch.extract.feed.clips import Cut
from egopatch.extract.feed.on_device import DeviceTransform
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.planes import Planes, even, find_colours
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform

SIZES = [
    *((240, 320), (256, 456), (720, 1280), (1080, 1920), (288, 384), (480, 640), (360, 640), (540, 960), (224, 224)),
    *((320, 240), (456, 256), (640, 360), (480, 270)),  # portrait
    *((97, 131), (131, 97), (255, 257), (257, 255), (333, 333), (241, 319), (719, 1281), (99, 1001)),  # odd
    *((1, 1), (1, 7), (5, 3), (16, 16), (31, 17), (2, 300), (300, 2)),  # tiny
    *((256, 256), (1200, 256), (256, 2000), (2160, 1440), (1440, 2560)),  # without resizing, huge
]
CLIP = Transform("clip", 224, 1.0, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", antialias=True)
CUBIC = Transform("cubic", 240, 0.9, (0.5,) * 3, (0.5,) * 3, "bicubic")
SQUEEZED = Transform("squeezed", None, None, (0.5,) * 3, (0.5,) * 3, antialias=True)
TRANSFORMS = [EGOVLP_TRANSFORM, lite.TRANSFORM, CLIP, CUBIC, SQUEEZED]


def difference(transform: Transform, height: int, width: int, device: torch.device) -> float:
    """Largest difference on noise, in normalised units."""
    frames = np.random.default_rng(height * width).integers(0, 256, (1, height, width, 3), np.uint8)
    window = transform.looks_at(height, width)
    cut = frames[:, window.top : window.top + window.height, window.left : window.left + window.width]
    out = torch.full((1, 3, 224, 224), torch.nan, device=device)
    out.copy_(DeviceTransform(transform, 224, device)(torch.from_numpy(cut).to(device), Cut((height, width), window)))
    return float((out.cpu() - to_input(list(frames), 224, transform)).abs().max())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_device_matches_the_cpu_on_the_published_transform(height: int, width: int, device: torch.device) -> None:
    assert difference(EGOVLP_TRANSFORM, height, width, device) < 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.name.split()[0])
def test_device_matches_the_cpu_on_other_filters_and_crops(transform: Transform, device: torch.device) -> None:
    for height, width in itertools.product((97, 256, 480), (131, 256, 720)):
        assert difference(transform, height, width, device) < 1e-5


@pytest.mark.parametrize("size", [(240, 320), (720, 1280), (256, 456), (64, 96), (2, 2), (2, 8)])
def test_yuv_planes_give_the_same_bits_as_rgb_pixels(size: tuple[int, int], device: torch.device) -> None:
    rng = np.random.default_rng(0)
    height, width = size
    colours = find_colours("yuv420p", 1, 1, width, height)
    assert colours is not None
    window = even(EGOVLP_TRANSFORM.looks_at(*size))
    shapes = ((height, width), (height // 2, width // 2), (height // 2, width // 2))
    frames = [Planes(*(rng.integers(0, 256, shape, np.uint8) for shape in shapes), colours) for _ in range(2)]  # type: ignore[misc]
    parts = [frame.cut(window) for frame in frames]
    memory = np.empty((2, parts[0].nbytes), np.uint8)
    for part, row in zip(parts, memory, strict=True):
        part.copy_to(row)
    transform = DeviceTransform(EGOVLP_TRANSFORM, 224, device)
    found = transform(torch.from_numpy(memory).to(device), Cut(size, window, colours))
    pixels = torch.from_numpy(np.stack([part.rgb() for part in parts]))
    assert torch.equal(found, transform(pixels.to(device), Cut(size, window)))
    expected = to_input([frame.rgb() for frame in frames], 224)
    assert float((found.cpu() - expected).abs().max()) < 1e-5


def test_window_covers_only_pixels_that_the_transform_reads() -> None:
    assert EGOVLP_TRANSFORM.looks_at(240, 320).width < 246
    assert EGOVLP_TRANSFORM.looks_at(1280, 720).height < 740
    assert (SQUEEZED.looks_at(50, 70).height, SQUEEZED.looks_at(50, 70).width) == (50, 70)
