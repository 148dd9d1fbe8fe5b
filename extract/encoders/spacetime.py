"""The space-time transformer that EgoVLP, EgoVLPv2 and MFAS share: divided attention over time, then over space.

Shape legend: B clips, T frames, N patches a frame, S = 1 + T*N tokens (CLS first, then frame by frame), D channels,
H heads of 64. Parameter names are those of the published checkpoints below `video_model.`.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from extract.encoders.linear import Linear

HEAD_WIDTH = 64
# Attention logits of one step on a CPU: 2 MB in bfloat16.
CACHED_LOGITS = 2**20
# Tokens that the MLP takes at a time on a CPU.
MLP_ROWS = 1600

Axis = Literal["time", "space"]


class Attention(nn.Module):
    """One divided attention: CLS attends everywhere, a patch along one axis plus CLS.

    Args:
        width: D; there are D // 64 heads.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        frames: int,
        axis: Axis,
        keep: Tensor | None = None,
        tap: bool = False,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: [B, S, D], normalised tokens.
            frames: T.
            axis: whether a patch sees its position in every frame, or its own frame.
            keep: [B, S] bool, tokens that may be attended to; None keeps all. CLS is always kept.
            tap: also return CLS's logits.
            residual: [B, S, D], added to the result.

        Returns:
            [B, S, D] after the output projection, and CLS's logits [B, S] as `attend_cls` gives them.
        """
        cls, logits = self.attend_cls(x, keep, tap)
        return self.proj(attend_patches(self.qkv(x), cls, frames, axis, keep), residual=residual), logits

    def attend_cls(self, x: Tensor, keep: Tensor | None = None, tap: bool = False) -> tuple[Tensor, Tensor | None]:
        """CLS over all tokens, before the output projection.

        CLS is a single query, so the key projection is moved to it (q W_k) and the value projection to the pooled
        tokens: both passes then read `x` as it lies, instead of keys and values strided by head.

        Args: as for `forward`.

        Returns:
            [B, D], and its scaled logits over all tokens, mean over heads, before softmax and mask ([B, S]
            float32), if `tap`.
        """
        by_head = (self.heads, HEAD_WIDTH)
        w_query, w_key, w_value = self.qkv.weight.chunk(3)
        b_query, b_key, b_value = self.qkv.bias.chunk(3)
        query = F.linear(x[:, 0], w_query, b_query).unflatten(-1, by_head) * HEAD_WIDTH**-0.5  # [B, H, 64]
        absorbed = torch.einsum("bhk,hkd->bhd", query, w_key.unflatten(0, by_head))
        logits = (x @ absorbed.transpose(1, 2)).float() + (query * b_key.unflatten(0, by_head)).sum(-1).float()[:, None]
        scores = logits if keep is None else logits.masked_fill(~keep[..., None], -torch.inf)
        weights = scores.softmax(dim=1).to(x.dtype)  # [B, S, H]
        pooled = weights.transpose(1, 2) @ x  # [B, H, D]
        out = torch.einsum("bhd,hkd->bhk", pooled, w_value.unflatten(0, by_head)).flatten(1) + b_value
        return out, logits.mean(dim=2) if tap else None


def attend_patches(qkv: Tensor, cls: Tensor, frames: int, axis: Axis, keep: Tensor | None = None) -> Tensor:
    """Patches over their frame or their position, plus CLS.

    Args:
        qkv: [B, S, 3*D], CLS first.
        cls: [B, D], what CLS's own attention gave; it becomes the first row.
        frames: T.
        axis: `space` or `time`.
        keep: [B, S] bool, as for `Attention.forward`.

    Returns:
        [B, S, D].
    """
    b, s, _ = qkv.shape
    n = (s - 1) // frames
    heads = qkv.shape[2] // (3 * HEAD_WIDTH)
    # [B, groups, H, tokens, 64] of each, a group being a frame or a position.
    order = (0, 1, 3, 2, 4) if axis == "space" else (0, 2, 3, 1, 4)
    first, rest = qkv.view(b, s, 3, heads, HEAD_WIDTH).split([1, s - 1], dim=1)
    cls_k, cls_v = first[:, 0, 1:, :, None].unbind(1)  # [B, H, 1, 64]
    q, k, v = (part.unflatten(1, (frames, n)).permute(order) for part in rest.unbind(2))
    groups, rows = q.shape[1], q.shape[3]
    mask = None
    if keep is not None:
        kept = keep[:, 1:].unflatten(1, (frames, n))
        kept = kept if axis == "space" else kept.transpose(1, 2)
        mask = F.pad(kept, (1, 0), value=True)[:, :, None, None]  # [B, groups, 1, 1, 1 + tokens]

    def some(part: slice) -> Tensor:
        def with_cls(cls: Tensor, patches: Tensor) -> Tensor:
            patches = patches[:, part]
            cls = cls[:, None].expand(b, patches.shape[1], heads, 1, HEAD_WIDTH)
            return torch.cat([cls, patches], dim=3).flatten(0, 1)

        some_mask = None if mask is None else mask[:, part].flatten(0, 1)
        out = attend(q[:, part].flatten(0, 1), with_cls(cls_k, k), with_cls(cls_v, v), some_mask)
        return out.unflatten(0, (b, -1))

    if torch.is_grad_enabled():
        patches = some(slice(None)).permute(order if axis == "space" else (0, 3, 1, 2, 4))
        return torch.cat([cls[:, None], patches.reshape(b, s - 1, -1)], dim=1)
    # On a CPU, as many groups at a time as stay in cache; that also keeps the peak of memory down.
    step = max(1, CACHED_LOGITS // (b * heads * rows * (rows + 1))) if qkv.device.type == "cpu" else groups
    result = qkv.new_empty(b, s, heads * HEAD_WIDTH)
    result[:, 0] = cls
    target = result[:, 1:].view(b, frames, n, heads, HEAD_WIDTH).permute(order)
    for start in range(0, groups, step):
        target[:, start : start + step] = some(slice(start, start + step))
    return result


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q [G, H, I, 64] over k, v [G, H, J, 64]; `mask` [G, 1, 1, J] is true where one may look.

    On a CPU in bfloat16 without gradients it is two batched products around a map in bfloat16, small enough to stay
    in cache: PyTorch's flash kernel takes nearly twice as long there at these lengths.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or torch.is_grad_enabled() or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scaled = torch.mul(q, HEAD_WIDTH**-0.5, out=q.new_empty(q.shape))  # contiguous, unlike q
    return (scaled @ k.transpose(-1, -2)).softmax(dim=-1) @ v


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual` [..., D] plus the layers' result on `x` [..., D]."""
        return self.fc2(self.fc1(x, gelu=True), residual=residual)


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
        normed = self.norm1(self.timeattn(self.norm3(x), frames, "time", residual=x)[0])
        x, logits = self.attn(normed, frames, "space", keep, tap, residual=x)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.mlp(self.norm2(x), residual=x), logits
        # In place and a stretch at a time: the hidden layer of a whole clip would be the peak of memory.
        for rows in x.flatten(0, 1).split(MLP_ROWS):
            rows.copy_(self.mlp(self.norm2(rows), residual=rows))
        return x, logits


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
