"""`encoder.arch: hf`: how frames are resized and normalised, as a model's `preprocessor_config.json` says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from egopatch.extract.encoders import CheckpointError, input_transform
from egopatch.extract.feed.on_host import crop_and_resize, to_input
from tests.extract.encoders.test_hf import PROCESSOR


def picture(height: int, width: int) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width]
    waves = [np.sin(rows / (7 + c)) + np.cos(cols / (5 + c)) for c in range(3)]
    return ((np.stack(waves, axis=-1) + 2) * 63).astype(np.uint8)


@pytest.mark.parametrize(("resample", "pillow"), [(2, Image.Resampling.BILINEAR), (3, Image.Resampling.BICUBIC)])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (61, 61)])
@pytest.mark.parametrize("squeezed", [False, True])
def test_resizing_matches_the_image_processor(
    tmp_path: Path, resample: int, pillow: Image.Resampling, shape: tuple[int, int], squeezed: bool
) -> None:
    cropped = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True}
    how = {"size": {"height": 56, "width": 56}} if squeezed else cropped
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **how, "resample": resample}))
    pixels = picture(*shape)
    transform = input_transform("hf", tmp_path, 56)
    image = Image.fromarray(pixels)
    if squeezed:
        expected = np.asarray(image.resize((56, 56), pillow))
    else:
        short = min(shape)
        resized = image.resize((int(64 * shape[1] / short), int(64 * shape[0] / short)), pillow)
        left, top = round((resized.width - 56) / 2), round((resized.height - 56) / 2)
        expected = np.asarray(resized.crop((left, top, left + 56, top + 56)))
    found = crop_and_resize(pixels[None], 56, transform)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() <= 1.5  # Pillow rounds to whole numbers after each direction


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({}, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
        ({"do_normalize": False}, [0, 0, 0], [1, 1, 1]),
        # ViViT: pixels / 127.5 - 1, then the normalisation.
        ({"rescale_factor": 1 / 127.5, "offset": True}, [0.75, 0.7, 0.65], [0.1, 0.15, 0.2]),
    ],
)
def test_normalisation_follows_the_preprocessor_config(
    tmp_path: Path, settings: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **settings}))
    pixels = picture(32, 32)
    found = to_input(pixels[None], 32, input_transform("hf", tmp_path, 32))[0]
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 1}, r"resample is 1; expected 2 \(bilinear\) or 3 \(bicubic\)"),
        ({"resample": [2]}, r"resample is \[2\]; expected 2"),
        ({"image_mean": 0.5}, r"image_mean is 0.5; expected three numbers"),
        ({"image_mean": ["a", "b", "c"]}, r"image_mean is .*; expected three numbers"),
        ({"image_mean": [float("nan")] * 3}, r"image_mean is .*; expected three numbers"),
        ({"image_std": [0.2, 0, 0.2]}, r"image_std is .*; expected three positive numbers"),
        ({"rescale_factor": "x"}, r"rescale_factor is 'x'; expected a positive number"),
        ({"rescale_factor": 0}, r"rescale_factor is 0; expected a positive number"),
        ({"do_resize": False}, r"do_resize is False; expected true"),
        ({"size": None}, r"size is None; expected a shortest_edge, or equal height and width"),
        ({"size": {"shortest_edge": "x"}}, r"size is .*; expected a shortest_edge"),
        ({"size": {"shortest_edge": -5}}, r"size is .*; expected a shortest_edge"),
        (
            {"size": {"shortest_edge": 32}, "crop_size": 64},
            r"crop_size is 64; expected .*, at most the shortest_edge, 32",
        ),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 9, "width": 8}}, r"crop_size is .*; expected equal"),
        ({"crop_size": 24}, r"crop_size is 24; expected 32, because frames that are squeezed"),
        (
            {"size": 256, "crop_size": 224, "image_processor_type": "DeiTImageProcessor"},
            r"crop_size is 224; expected 256",
        ),
        ({"size": {"height": 30, "width": 32}}, r"size is .*; expected a shortest_edge, or equal height and width"),
    ],
)
def test_unsupported_preprocessing_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **settings}))
    with pytest.raises(CheckpointError, match=message):
        input_transform("hf", tmp_path, 32)


def test_folder_without_preprocessor_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json, which says how frames are resized"):
        input_transform("hf", tmp_path, 32)
