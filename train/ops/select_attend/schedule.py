"""Grouping of questions by clip, so that one read of a frame serves up to 16 questions."""

import torch
from torch import Tensor

QUESTIONS = 16  # of one clip in a program; fewer rows are wrong or slow in tensor-core products


def schedule(clip_index: Tensor, clips: int, clip_rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Group the questions by clip and cut each group into tiles of `QUESTIONS`, without waiting for the device.

    Args:
        clip_index: [B] clip of each question.
        clips: how many there are.
        clip_rows: [C] row of the tokens of each clip; None where they are the clips themselves.

    Returns:
        order [B], the questions sorted by clip; tiles [G, 4], of each its clip, its first place in `order`, its number
        of questions, with 0 of them in the tiles that are not needed, and its row of the tokens; clip_tiles [C + 1],
        first tile of a clip.
    """
    device = clip_index.device
    sorted_clips, order = torch.sort(clip_index, stable=True)
    edges = torch.searchsorted(sorted_clips, torch.arange(clips + 1, dtype=clip_index.dtype, device=device))
    per_clip = (edges.diff() + QUESTIONS - 1) // QUESTIONS
    clip_tiles = torch.cat([per_clip.new_zeros(1), per_clip.cumsum(0)])
    tile = torch.arange(tile_bound(len(clip_index), clips), device=device)
    clip = torch.searchsorted(clip_tiles, tile, right=True) - 1
    unused = clip >= clips
    clip = clip.clamp_max(clips - 1)
    first = edges[clip] + (tile - clip_tiles[clip]) * QUESTIONS
    count = (edges[clip + 1] - first).clamp(0, QUESTIONS).masked_fill(unused, 0)
    row = clip if clip_rows is None else clip_rows[clip]
    return order.int(), torch.stack([clip, first, count, row], dim=1).int(), clip_tiles.int()


def tile_bound(questions: int, clips: int) -> int:
    """G: at least as many tiles as any assignment of questions to clips needs."""
    return min(questions, clips + questions // QUESTIONS)
