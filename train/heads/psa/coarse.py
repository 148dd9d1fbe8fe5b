"""The coarse level of `psa`: attention over 2x2-merged patches, which cover what the fine level does not select.

Shape legend: C clips, B questions, U unique texts, T frames, N patches a frame, M merged patches, D token channels,
P position channels, H attention heads, W hidden width.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.question import (
    ATTENTION_GAIN,
    Sizes,
    Whitening,
    absorb_key,
    with_gain,
    without_autocast,
)
from egopatch.train.heads.common.scale import scaled
from egopatch.train.heads.psa.selection import PatchSelection
from egopatch.train.ops.rows import Rows

MERGE = 2
# Sines and cosines of row and column at 4 frequencies; a multiple of 16, as the kernels require.
POSITION_WIDTH = 16
# Clips whose patches are converted to float32 and merged at a time: a CPU's cache is small, a GPU's launches cost time.
MERGE_CLIPS = {"cpu": 4, "cuda": 32}
# The kernels read this many channels at a time.
KERNEL_CHANNELS = 64


class CoarseLevel(nn.Module):
    """Attention over all merged patches, weighted against the fine level by a learned gate.

    A merged patch is the mean of frozen patches, hence frozen too, so that key and value projections are absorbed as at
    the fine level. Its position is appended as further channels: queries can select by it, and values contain it.
    """

    positions: Tensor

    def __init__(self, sizes: Sizes, width: int, heads: int, learned: bool, select: PatchSelection) -> None:
        super().__init__()
        self.grid, self.heads, self.width = sizes.grid, heads, sizes.width
        rows, cols = (math.ceil(side / MERGE) for side in sizes.grid)
        self.select = select
        self.register_buffer("positions", position_channels(rows, cols), persistent=False)
        wide = sizes.width + POSITION_WIDTH
        self.query = with_gain(nn.Linear(width, width), ATTENTION_GAIN)
        self.key = with_gain(nn.Linear(wide, width, bias=False), ATTENTION_GAIN)
        self.value = nn.Linear(wide, width)
        self.gate = nn.Parameter(torch.ones(width), requires_grad=learned)

    def forward(self, whiten: Whitening, batch: Batch, question: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Questions [U, W], of which `rows` picks, to the gate [W] and the values [B, T, W] that it weighs."""
        # In chunks: all clips in float32 would take several times the memory of the stored tokens.
        chunks = batch.patch_chunks(MERGE_CLIPS[question.device.type])
        merged = [self.merge(scaled(*chunk)) for chunk in chunks]
        coarse = merged[0] if len(merged) == 1 else torch.cat(merged)
        tokens = torch.cat([coarse, self.positions.expand(*coarse.shape[:3], -1)], dim=-1)
        with without_autocast(question):
            queries = absorb_key(self.query(question), self.key, self.heads)
        content, position = queries.split([self.width, POSITION_WIDTH], dim=-1)
        queries = rows.of(torch.cat([whiten.absorb(content), position], dim=-1)).float()
        if tokens.is_cuda:
            # The kernels multiply float16 at many times float32's rate; a mean loses no more in it than its tokens did.
            assert batch.stored is not None
            bfloat16 = batch.stored.patches.dtype == torch.bfloat16
            padding = (0, -tokens.shape[-1] % KERNEL_CHANNELS)
            tokens = functional.pad(tokens.to(torch.bfloat16 if bfloat16 else torch.float16), padding)
            queries = functional.pad(queries, padding)
        pooled, _, _ = self.select(
            tokens,
            batch.clip_index,
            queries,
            torch.zeros_like(queries[:, 0]),
            coarse.new_zeros(coarse.shape[:3]),
            None,
        )
        pooled = pooled[..., : self.width + POSITION_WIDTH]
        content, position = self.value.weight.split([self.width, POSITION_WIDTH], dim=1)
        with without_autocast(content):
            content = content @ whiten.matrix
            bias = torch.addmv(self.value.bias, content, whiten.mean, alpha=-1)
        by_head = rearrange(torch.cat([content, position], dim=1), "(h e) d -> h e d", h=self.heads)
        values = rearrange(torch.einsum("bthd,hed->bthe", pooled, by_head), "b t h e -> b t (h e)")
        return self.gate, values + bias

    def merge(self, x: Tensor) -> Tensor:
        """[C, T, N, D] to [C, T, M, D]: the mean of each 2x2 block, of the patches inside the grid at odd edges."""
        channels = rearrange(x, "c t (rows cols) d -> (c t) d rows cols", rows=self.grid[0])
        merged = functional.avg_pool2d(channels, MERGE, ceil_mode=True, count_include_pad=False)
        return rearrange(merged, "(c t) d rows cols -> c t (rows cols) d", c=len(x))


def position_channels(rows: int, cols: int) -> Tensor:
    """[rows * cols, P]: sines and cosines of the row and the column of each position."""
    by_row = repeat(_waves(rows), "rows p -> (rows cols) p", cols=cols)
    by_column = repeat(_waves(cols), "cols p -> (rows cols) p", rows=rows)
    return torch.cat([by_row, by_column], dim=1)


def _waves(cells: int) -> Tensor:
    """[cells, P / 2]."""
    position = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells
    waves = position[:, None] * math.pi * 2.0 ** torch.arange(POSITION_WIDTH // 4)
    return torch.cat([waves.sin(), waves.cos()], dim=1)
