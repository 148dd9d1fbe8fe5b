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
from egopatch.train.heads.psa.selection import Patches, PatchSelection
from egopatch.train.ops.rows import RowPicker
from egopatch.train.ops.select_attend import Implementation

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

    def __init__(self, sizes: Sizes, width: int, heads: int, learned: bool, implementation: Implementation) -> None:
        super().__init__()
        self.grid, self.heads, self.width = sizes.grid, heads, sizes.width
        rows, cols = (math.ceil(side / MERGE) for side in sizes.grid)
        self.select = PatchSelection(rows * cols, implementation)
        self.register_buffer("positions", position_channels(rows, cols), persistent=False)
        wide = sizes.width + POSITION_WIDTH
        self.query = with_gain(nn.Linear(width, width), ATTENTION_GAIN)
        self.key = with_gain(nn.Linear(wide, width, bias=False), ATTENTION_GAIN)
        self.value = nn.Linear(wide, width)
        self.gate = nn.Parameter(torch.ones(width), requires_grad=learned)

    def forward(self, whiten: Whitening, batch: Batch, question: Tensor, rows: RowPicker) -> tuple[Tensor, Tensor]:
        """The gate [W] and the values [B, T, W] that it weighs; `rows` picks from the questions [U, W]."""
        tokens, clip_rows = batch.derived, batch.clip_rows
        if tokens is None:
            # In chunks: all clips in float32 would take several times the memory of the stored tokens.
            chunks = batch.patch_chunks(MERGE_CLIPS[question.device.type])
            derived = [self.derive(*chunk) for chunk in chunks]
            tokens, clip_rows = derived[0] if len(derived) == 1 else torch.cat(derived), None
        with without_autocast(question):
            queries = absorb_key(self.query(question), self.key, self.heads)
        content, position = queries.split([self.width, POSITION_WIDTH], dim=-1)
        queries = rows.of(torch.cat([whiten.absorb(content), position], dim=-1)).float()
        queries = _widened(queries, tokens.shape[-1])
        clips = len(tokens) if clip_rows is None else len(clip_rows)
        pooled, _, _ = self.select(
            Patches(tokens, batch.clip_index, None, clip_rows),
            queries,
            torch.zeros_like(queries[:, 0]),
            torch.zeros(clips, *tokens.shape[1:3], device=tokens.device),
        )
        content, position = self.value.weight.split([self.width, POSITION_WIDTH], dim=1)
        with without_autocast(content):
            content = content @ whiten.matrix
            bias = torch.addmv(self.value.bias, content, whiten.mean, alpha=-1)
        # Zeros for the tokens' padding channels: to drop those from pooled instead would copy it, and it is far larger.
        weight = _widened(torch.cat([content, position], dim=1), tokens.shape[-1])
        by_head = rearrange(weight, "(h e) d -> h e d", h=self.heads)
        values = rearrange(torch.einsum("bthd,hed->bthe", pooled, by_head), "b t h e -> b t (h e)")
        return self.gate, values + bias

    def derive(self, patches: Tensor, scale: Tensor | None) -> Tensor:
        """Merged patches and their positions, [C, T, M, D + P], from stored patches [C, T, N, D] and their scale.

        On a GPU, dtype and number of channels are those that suit the kernels.
        """
        coarse = self.merge(scaled(patches, scale))
        tokens = torch.cat([coarse, self.positions.expand(*coarse.shape[:3], -1)], dim=-1)
        if not tokens.is_cuda:
            return tokens
        # The kernels multiply float16 many times faster than float32; a mean loses no more in it than its tokens did.
        dtype = torch.bfloat16 if patches.dtype == torch.bfloat16 else torch.float16
        return _widened(tokens.to(dtype), kernel_width(self.width))

    def merge(self, x: Tensor) -> Tensor:
        """[C, T, N, D] to [C, T, M, D]: the mean of each 2x2 block; at odd edges, of its patches inside the grid."""
        channels = rearrange(x, "c t (rows cols) d -> (c t) d rows cols", rows=self.grid[0])
        merged = functional.avg_pool2d(channels, MERGE, ceil_mode=True, count_include_pad=False)
        return rearrange(merged, "(c t) d rows cols -> c t (rows cols) d", c=len(x))


def kernel_width(width: int) -> int:
    """Channels that the kernels read: `width` of the merged patches, their positions, and padding."""
    wide = width + POSITION_WIDTH
    return wide + -wide % KERNEL_CHANNELS


def _widened(x: Tensor, channels: int) -> Tensor:
    """`x` [..., D] padded with zeros to [..., `channels`]."""
    padding = channels - x.shape[-1]
    return functional.pad(x, (0, padding)) if padding else x


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
