"""Values of patches lie over the pixels that the patches cover."""

import numpy as np
import pytest
import torch

from egopatch.extract.feed.on_host import crop_and_resize
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform, covered_box
from egopatch.features import StoreSpec, to_pixels

WHOLE = Transform("whole", None, None, (0.0,) * 3, (1.0,) * 3)
CENTRE = Transform("centre", None, 0.875, (0.0,) * 3, (1.0,) * 3)
ANTIALIASED = Transform("resize, crop", 72, 0.9, (0.0,) * 3, (1.0,) * 3, "bicubic", antialias=True)


@pytest.mark.parametrize("transform", [EGOVLP_TRANSFORM, WHOLE, CENTRE, ANTIALIASED])
@pytest.mark.parametrize(("height", "width"), [(120, 160), (160, 90), (96, 96)])
def test_patches_map_back_to_the_pixels_they_cover(transform: Transform, height: int, width: int) -> None:
    # A frame whose colours are the coordinates of its pixels: a patch's mean colour says where it lies.
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    frame = np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)
    seen = crop_and_resize([frame], 64, transform) * 255
    means = torch.nn.functional.avg_pool2d(seen, 16)[0]  # [3, 4, 4]
    spread = to_pixels(means[:2].flatten(1), (4, 4), height, width, covered_box(height, width, transform))
    top, left, box_height, box_width = covered_box(height, width, transform)
    for row in range(1, 3):  # inner patches, between whose centres the map is linear
        for col in range(1, 3):
            place = int(top + (row + 0.5) * box_height / 4), int(left + (col + 0.5) * box_width / 4)
            assert abs(float(spread[0][place]) - place[0]) < 1.5
            assert abs(float(spread[1][place]) - place[1]) < 1.5


def test_an_array_of_numpy_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^values is array\(.*; expected a tensor: torch\.from_numpy\(array\)$"):
        to_pixels(np.zeros(4), (2, 2), 20, 40)  # type: ignore[arg-type]


def test_pixels_outside_the_crop_are_nan() -> None:
    saliency = torch.rand(3, 16)
    spread = to_pixels(saliency, (4, 4), 20, 40, box=(0, 10, 20, 20))
    assert spread.shape == (3, 20, 40)
    assert spread[:, :, :10].isnan().all()
    assert spread[:, :, 30:].isnan().all()
    assert not spread[:, :, 10:30].isnan().any()
    # The centre of each patch of 5 x 5 pixels, and a corner.
    assert torch.allclose(spread[:, 2::5, 12:30:5].flatten(1), saliency, atol=1e-6)
    assert torch.equal(spread[:, 0, 10], saliency[:, 0])


def test_only_kept_patches_of_a_derived_store_fill_pixels() -> None:
    spread = to_pixels(torch.tensor([[1.0, 2.0]]), (2, 2), 8, 8, positions=torch.tensor([[0, 3]], dtype=torch.int16))
    assert spread[0, 1, 1] == 1
    assert spread[0, 6, 6] == 2
    assert spread[0, 1, 6].isnan()


def test_a_pixel_mostly_covered_by_a_missing_patch_is_nan() -> None:
    # Patch 0 has the weights 1, 3/4, 1/4 and 0 in the four columns.
    spread = to_pixels(torch.tensor([7.0]), (1, 2), 2, 4, positions=torch.tensor([0]))
    assert spread.isnan().tolist() == [[False, False, True, True]] * 2
    assert torch.equal(spread[:, :2], torch.full((2, 2), 7.0))


def test_another_number_of_values_than_the_grid_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"values has 5 patches a frame; expected 4, as in the grid \(2, 2\)"):
        to_pixels(torch.rand(5), (2, 2), 8, 8)
    with pytest.raises(ValueError, match=r"values has 1 patch a frame; expected 4"):
        to_pixels(torch.rand(1), (2, 2), 8, 8)


@pytest.mark.parametrize(("grid", "height"), [((2, 2), 0), ((-2, -2), 8), ((0, 2), 8)])
def test_an_empty_grid_or_frame_is_refused(grid: tuple[int, int], height: int) -> None:
    with pytest.raises(ValueError, match=rf"grid is .* and the frame has {height} x 8 pixels; expected sides of at"):
        to_pixels(torch.rand(4), grid, height, 8)
    with pytest.raises(ValueError, match="the frame has 0 x 8 pixels; expected sides of at least 1"):
        covered_box(0, 8)
    with pytest.raises(ValueError, match=r"grid is \(-2, -3\); expected at least 1 row and 1 column"):
        StoreSpec.for_patches(4, (-2, -3), 8)


@pytest.mark.parametrize("box", [(0, 0, 0, 8), (4, 4, -2, 4), (0, float("nan"), 8, 8), (0, 4, 8, 8)])
def test_a_box_that_is_empty_or_leaves_the_frame_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="expected one inside the frame of 8 x 8 pixels"):
        to_pixels(torch.rand(4), (2, 2), 8, 8, box=box)


@pytest.mark.parametrize("positions", [[0, 4], [0, -1], [0, 1, 2]])
def test_positions_outside_the_grid_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"positions has shape .*; expected \(2,\), and indices in the grid \(2, 2\)"):
        to_pixels(torch.rand(2), (2, 2), 8, 8, positions=torch.tensor(positions))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"grid": 2}, r"^grid is 2; expected \(rows, cols\): store\.spec\.grid$"),
        ({"height": 8.0}, r"^height is 8\.0; expected a whole number of pixels$"),
        ({"box": (0, 0)}, r"^box is \(0, 0\); expected \(top, left, height, width\) in pixels$"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_by_name(wrong: dict[str, object], expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        to_pixels(**({"values": torch.zeros(4), "grid": (2, 2), "height": 8, "width": 8} | wrong))  # type: ignore[arg-type]
