"""The space-time transformer that EgoVLP, EgoVLPv2 and MFAS share: divided attention over time, then over space.

Shape legend: B clips, T frames, N patches a frame, S = 1 + T*N tokens (CLS first, then frame by frame), D channels,
H heads of 64. Parameter names are those of the published checkpoints below `video_model.`.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 64


class Attention(nn.Module):
    """Projections of one divided attention. `forward` lets CLS attend everywhere and a patch along `axis`, plus CLS.

    Args:
        width: D; there are D // 64 heads.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, frames: int, axis: Literal["time", "space"], keep: Tensor | None = None, tap: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: [B, S, D], normalised tokens.
            frames: T.
            axis: whether a patch sees its position in every frame, or its own frame.
            keep: [B, S] bool, tokens that may be attended to; None keeps all.
            tap: also return CLS's logits.

        Returns:
            [B, S, D] after the output projection, and CLS's scaled logits over all tokens, mean over heads, before
            softmax and mask ([B, S] float32), if `tap`.
        """
        out, logits = divided_attention(self.qkv(x), self.heads, frames, axis, keep, tap)
        return self.proj(out), logits


def divided_attention(
    qkv: Tensor, heads: int, frames: int, axis: Literal["time", "space"], keep: Tensor | None = None, tap: bool = False
) -> tuple[Tensor, Tensor | None]:
    """CLS over all tokens, patches over `axis` plus CLS. Arguments as in `Attention.forward`, on `qkv` [B, S, 3*D]."""
    b, s, _ = qkv.shape
    n = (s - 1) // frames
    q, k, v = qkv.view(b, s, 3, heads, HEAD_WIDTH).unbind(2)  # [B, S, H, 64] each
    cls, logits = _cls_attention(q[:, 0], k, v, keep, tap)

    def lay(tokens: Tensor, with_cls: bool) -> Tensor:
        patches = tokens[:, 1:].view(b, frames, n, heads, HEAD_WIDTH)
        if axis == "time":
            patches = patches.transpose(1, 2)
        if with_cls:
            first = tokens[:, :1, None].expand(b, patches.shape[1], 1, heads, HEAD_WIDTH)
            patches = torch.cat([first, patches], dim=2)
        return patches.flatten(0, 1).transpose(1, 2)  # [B*groups, H, tokens, 64]

    mask = None
    if keep is not None:
        patches_keep = keep[:, 1:].view(b, frames, n)
        if axis == "time":
            patches_keep = patches_keep.transpose(1, 2)
        groups = patches_keep.shape[1]
        mask = torch.cat([keep[:, :1, None].expand(b, groups, 1), patches_keep], dim=2).flatten(0, 1)[:, None, None]
    out = F.scaled_dot_product_attention(lay(q, False), lay(k, True), lay(v, True), attn_mask=mask)
    out = out.transpose(1, 2).reshape(b, -1, *out.shape[2:3], heads * HEAD_WIDTH)
    out = out.reshape(b, n, frames, -1).transpose(1, 2) if axis == "time" else out
    return torch.cat([cls, out.reshape(b, s - 1, heads * HEAD_WIDTH)], dim=1), logits


def _cls_attention(query: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, tap: bool) -> tuple[Tensor, Tensor | None]:
    """`query` [B, H, 64] over keys and values [B, S, H, 64]: its output [B, 1, D], and the mean logits if `tap`."""
    logits = torch.einsum("bhd,bshd->bhs", query * HEAD_WIDTH**-0.5, k).float()
    weights = (logits if keep is None else logits.masked_fill(~keep[:, None], -torch.inf)).softmax(dim=-1)
    out = torch.einsum("bhs,bshd->bhd", weights.to(v.dtype), v)
    return out.flatten(1)[:, None], logits.mean(dim=1) if tap else None


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class SpaceTimeBlock(nn.Module):
    """One block: time attention, space attention on its result, whose residual goes back to the block's *input*.

    Args:
        width: D.
        hidden: width of the MLP.
        eps: of the norms; EgoVLP has 1e-6, EgoVLPv2 1e-5.
    """

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width)
        self.timeattn = Attention(width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden)
        self.norm3 = nn.LayerNorm(width, eps)

    def forward(
        self, x: Tensor, frames: int, keep: Tensor | None = None, tap: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] to [B, S, D]; see `Attention.forward` for the rest. `keep` is for space attention alone."""
        timed = x + self.timeattn(self.norm3(x), frames, "time")[0]
        spaced, logits = self.attn(self.norm1(timed), frames, "space", keep, tap)
        x = x + spaced
        return x + self.mlp(self.norm2(x)), logits


class PatchEmbed(nn.Module):
    """Frames to patch tokens; a convolution whose stride is its kernel."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, 3, H, W] to [B, T*N, D]."""
        b = frames.shape[0]
        patches = self.proj(frames.flatten(0, 1))  # [B*T, D, rows, cols]
        return patches.flatten(2).transpose(1, 2).reshape(b, -1, patches.shape[1])


class SpaceTimeTransformer(nn.Module):
    """The video network down to a depth.

    Args:
        width: D.
        hidden: width of the MLPs.
        depth: blocks.
        frames: T, temporal positions.
        patches: N, spatial positions.
        patch: side of a patch in pixels.
        eps: of the blocks' norms.
        final_eps: of a norm after the last block; None leaves the tokens raw.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        depth: int,
        frames: int,
        patches: int,
        patch: int,
        eps: float,
        final_eps: float | None,
    ) -> None:
        super().__init__()
        self.frames = frames
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, width))
        self.temporal_embed = nn.Parameter(torch.empty(1, frames, width))
        self.blocks = nn.ModuleList(SpaceTimeBlock(width, hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, final_eps) if final_eps is not None else nn.Identity()

    def positions(self) -> Tensor:
        """[1, S, D]: spatial + temporal position of every token; CLS has a spatial one alone."""
        grid = self.pos_embed[:, None, 1:] + self.temporal_embed[:, :, None]  # [1, T, N, D]
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2)], dim=1)

    def embed(self, frames: Tensor) -> Tensor:
        """[B, T, 3, H, W] to [B, S, D], positions added."""
        patches = self.patch_embed(frames)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([cls, patches], dim=1) + self.positions()

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            frames: [B, T, 3, H, W], normalised.

        Returns:
            Tokens [B, S, D] after the last block (and norm, where there is one), and CLS's mean logits [B, S] there.
        """
        x = self.embed(frames)
        last = len(self.blocks) - 1
        logits: Tensor | None = None
        for i, block in enumerate(self.blocks):
            x, logits = block(x, self.frames, tap=i == last)
        assert logits is not None
        return self.norm(x), logits
