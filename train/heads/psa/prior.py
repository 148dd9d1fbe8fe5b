"""Initial values of the learned spatial prior: where in a frame hands and handled objects usually are."""

from typing import Literal

import torch
from torch import Tensor

# Rows 4-13 and columns 2-11 of the published 14x14 grid (MFAS), as fractions of the frame.
REGION = (4 / 14, 14 / 14, 2 / 14, 12 / 14)
# Centre of that region, and half its width: mean and standard deviation of the Gaussian.
CENTRE, SPREAD = (9 / 14, 7 / 14), 5 / 14

Prior = Literal["region", "centre", "flat"]


def spatial_prior(grid: tuple[int, int], shape: Prior) -> Tensor:
    """[rows, cols] in [0, 1]: `region` is the fraction of each patch inside the published region, scaled to this
    grid; `centre` is a Gaussian at the region's centre; `flat` is zero.
    """
    rows, cols = grid
    if shape == "flat":
        return torch.zeros(rows, cols)
    if shape == "centre":
        return torch.outer(_gaussian(rows, CENTRE[0]), _gaussian(cols, CENTRE[1]))
    top, bottom, left, right = REGION
    return torch.outer(_overlap(rows, top, bottom), _overlap(cols, left, right))


def _overlap(cells: int, first: float, last: float) -> Tensor:
    edges = torch.arange(cells + 1, dtype=torch.float32) / cells
    return (edges[1:].clamp(max=last) - edges[:-1].clamp(min=first)).clamp(min=0) * cells


def _gaussian(cells: int, middle: float) -> Tensor:
    positions = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells
    return torch.exp(-0.5 * ((positions - middle) / SPREAD) ** 2)
