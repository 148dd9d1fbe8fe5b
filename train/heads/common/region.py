"""A region of the patch grid that grows from frame to frame, as in MFAS; the published head and psa both use it.

Shape legend: C clips, T frames, N patches a frame.
"""

import torch
from einops import rearrange
from torch import Tensor


def grow_region(score: Tensor, start: Tensor, top: int) -> Tensor:
    """The region of each frame [C, T, N] bool: it starts as `start` and adds high-scoring neighbours frame by frame.

    Args:
        score: [C, T, N].
        start: [rows, cols] bool, rows * cols = N.
        top: Number of patches a frame that may join: of the `top` highest, those that touch the region do
            (4-neighbours). In a frame with fewer patches, all of them may.
    """
    clips, frames, _ = score.shape
    rows, cols = start.shape
    stride = cols + 2  # a border of one, so that every patch has four neighbours
    bordered = torch.zeros(clips, rows + 2, stride, dtype=torch.bool, device=score.device)
    bordered[:, 1:-1, 1:-1] = start
    best = score.topk(min(top, rows * cols), dim=2).indices
    position = (best // cols + 1) * stride + best % cols + 1  # [C, T, top] in the bordered grid
    flat = bordered.view(clips, -1)
    regions = []
    for t in range(frames):
        joins = flat.gather(1, position[:, t])
        for offset in (-stride, stride, -1, 1):
            joins = joins | flat.gather(1, position[:, t] + offset)
        flat = flat.scatter(1, position[:, t], joins)
        inside = rearrange(flat, "c (rows cols) -> c rows cols", cols=stride)[:, 1:-1, 1:-1]
        regions.append(rearrange(inside, "c rows cols -> c (rows cols)"))
    return torch.stack(regions, dim=1)
