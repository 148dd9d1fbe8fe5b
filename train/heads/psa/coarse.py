"""The coarse level of `psa`: attention over 2x2-merged patches, the surroundings of what the fine level selects.

Shape legend: C clips, B questions, U unique texts, T frames, N patches a frame, M merged ones, D token channels,
P position channels, H attention heads, W hidden width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.question import ATTENTION_GAIN, Sizes, Whiten, absorb_key, bold
from egopatch.train.heads.psa.selection import Selection

MERGE = 2
# Sines and cosines of row and column at 4 frequencies; a multiple of 16, which the kernels ask for.
POSITION_WIDTH = 16
# Clips whose patches are turned to float32 and merged at once.
MERGE_CLIPS = 4


class CoarseLevel(nn.Module):
    """Attention over merged patches, all of them kept, weighed against the fine level by a learned gate.

    A merged patch is the mean of its block, frozen like its parts, so that key and value projections are absorbed as at
    the fine level. Its place goes along as further channels, so that a query can ask for it and the answer tells it.
    """

    positions: Tensor

    def __init__(self, sizes: Sizes, width: int, heads: int, learned: bool, select: Selection) -> None:
        super().__init__()
        self.grid, self.heads, self.width = sizes.grid, heads, sizes.width
        rows, cols = (math.ceil(side / MERGE) for side in sizes.grid)
        self.select = select
        self.register_buffer("positions", place_channels(rows, cols), persistent=False)
        wide = sizes.width + POSITION_WIDTH
        self.query = bold(nn.Linear(width, width), ATTENTION_GAIN)
        self.key = bold(nn.Linear(wide, width, bias=False), ATTENTION_GAIN)
        self.value = nn.Linear(wide, width)
        self.gate = nn.Parameter(torch.ones(width), requires_grad=learned)

    def forward(self, whiten: Whiten, batch: Batch, question: Tensor) -> Tensor:
        """Questions [U, W] to [B, T, W]."""
        # A few clips at a time: all of them in float32 would take several times the memory of the stored tokens.
        coarse = torch.cat([self.merge(scaled(tokens)) for tokens in batch.token_chunks(MERGE_CLIPS)])
        places = self.positions.expand(*coarse.shape[:3], -1)
        queries = absorb_key(self.query(question), self.key, self.heads)
        of_content, of_place = queries.split([self.width, POSITION_WIDTH], dim=-1)
        queries = torch.cat([whiten.absorb(of_content), of_place], dim=-1)[batch.text_index].float()
        pooled, _, _ = self.select(
            torch.cat([coarse, places], dim=-1),
            batch.clip_index,
            queries,
            torch.zeros_like(queries[:, 0]),
            coarse.new_zeros(coarse.shape[:3]),
            None,
        )
        of_content, of_place = self.value.weight.split([self.width, POSITION_WIDTH], dim=1)
        of_content = of_content @ whiten.matrix
        weight = torch.cat([of_content, of_place], dim=1).view(self.heads, -1, pooled.shape[-1])
        seen = torch.einsum("bthd,hed->bthe", pooled, weight).flatten(2)
        return self.gate * (seen + self.value.bias - of_content @ whiten.mean)

    def merge(self, x: Tensor) -> Tensor:
        """[C, T, N, D] to [C, T, M, D]: the mean of each 2x2 block, of what there is of it at odd edges."""
        c, t, _, d = x.shape
        channels = x.view(c * t, *self.grid, d).permute(0, 3, 1, 2)
        merged = functional.avg_pool2d(channels, MERGE, ceil_mode=True, count_include_pad=False)
        return merged.permute(0, 2, 3, 1).reshape(c, t, -1, d)


def scaled(tokens: PatchTokens) -> Tensor:
    """The patches [C, T, n, D] in float32, multiplied by their scale where they were stored in few bits."""
    patches = tokens.patches.float()
    return patches if tokens.scale is None else patches * tokens.scale[..., None]


def place_channels(rows: int, cols: int) -> Tensor:
    """[rows * cols, P]: sines and cosines of a place's row and column."""
    parts = []
    for cells, axis in ((rows, 0), (cols, 1)):
        place = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells
        waves = place[:, None] * math.pi * 2.0 ** torch.arange(POSITION_WIDTH // 4)
        wave = torch.cat([waves.sin(), waves.cos()], dim=1)
        parts.append(wave[:, None].expand(-1, cols, -1) if axis == 0 else wave[None].expand(rows, -1, -1))
    return torch.cat(parts, dim=-1).flatten(0, 1)
