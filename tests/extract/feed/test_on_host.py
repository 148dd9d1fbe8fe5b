from dataclasses import replace

import numpy as np
import pytest
import torch

from egopatch.extract.feed.clips import Cut
from egopatch.extract.feed.on_host import crop_and_resize, resize, to_input
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform

# Two resamplings with float32 coordinates: 2 x 256 pixels x 2^-23, times the steepest step of noise, 1 / 0.224.
ROUNDING = 2 * 256 * 2**-23 / 0.224


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Textbook bilinear resampling of [H, W, 3] with half-pixel centres and clamped edges, in float64."""

    def weights(source: int, target: int) -> np.ndarray:
        centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.floor(centres).astype(int)
        high = np.minimum(low + 1, source - 1)
        matrix = np.zeros((target, source))
        np.add.at(matrix, (np.arange(target), low), 1 - (centres - low))
        np.add.at(matrix, (np.arange(target), high), centres - low)
        return matrix

    return np.einsum(
        "ph,qw,hwc->pqc", weights(image.shape[0], height), weights(image.shape[1], width), image, optimize=True
    )


@pytest.mark.parametrize(("height", "width"), [(288, 384), (480, 270), (256, 256), (97, 131)])
def test_input_matches_the_published_transform(height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    short = min(height, width)
    tall, wide = (256, int(256 * width / height)) if height == short else (int(256 * height / width), 256)
    top, left = round((tall - 256) / 2), round((wide - 256) / 2)
    for frame, result in zip(frames, to_input(frames, 224), strict=True):
        resized = bilinear(frame / 255, tall, wide)[top : top + 256, left : left + 256]
        expected = (bilinear(resized, 224, 224) - EGOVLP_TRANSFORM.mean) / EGOVLP_TRANSFORM.std
        np.testing.assert_allclose(result.permute(1, 2, 0), expected, atol=ROUNDING)


TRANSFORMS = (
    EGOVLP_TRANSFORM,
    replace(EGOVLP_TRANSFORM, short_side=None, share=None),
    replace(EGOVLP_TRANSFORM, short_side=64, share=0.875, resampling="bicubic", antialias=True),
)


def sizes() -> list[tuple[int, int]]:
    drawn = np.random.default_rng(0).integers(16, 500, (30, 2)).tolist()
    return [(720, 1280), (1920, 1080), (256, 456), (2, 2), (3, 301), (256, 256), *map(tuple, drawn)]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_cut_frames_give_the_bits_of_whole_ones_with_channels_first(transform: Transform) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes()]
    cuts = [Cut(size, transform.looks_at(*size)) for size in sizes()]
    parts = [frame[cut.window.rows, cut.window.columns] for frame, cut in zip(frames, cuts, strict=True)]
    results = crop_and_resize(parts, 160, transform, cuts)
    torch.set_num_threads(1)
    for frame, result in zip(frames, results, strict=True):
        whole = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))[None] / 255
        resized = resize(whole, transform.resized(*frame.shape[:2]), transform)
        crop = transform.crop(*resized.shape[-2:])
        expected = resize(resized[..., crop.rows, crop.columns], (160, 160), transform)
        assert torch.equal(result, expected[0]), frame.shape


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    frames = [np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(crop_and_resize(frames, 224))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(results[0], result) for result in results)


def test_crop_stays_in_the_unit_range() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (1, 120, 160, 3), dtype=np.uint8)
    pixels = crop_and_resize(frames, 112)
    assert pixels.shape == (1, 3, 112, 112)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_frames_of_several_sizes_are_resized_independently() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((97, 131), (131, 97), (97, 131))]
    alone = torch.cat([to_input([frame], 64) for frame in frames])
    assert torch.equal(to_input(frames, 64), alone)
