"""The space-time transformer that EgoVLP, EgoVLPv2 and MFAS share: divided attention over time, then over space.

Shape legend: B clips, T frames, N patches a frame, S = 1 + T*N tokens (CLS first, then frame by frame), D channels,
H heads of 64. Parameter names are those of the published checkpoints below `video_model.`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.layers.linear import Linear
from egopatch.features.common.machine import triton_fault

HEAD_WIDTH = 64
# Tokens that a block processes at a time on a CPU, so that intermediate results fit in the cache.
ROWS = 1600
# Attention logits that a CPU computes at a time: 2 MB in bfloat16.
LOGITS = 2**20
# The kernel for GPUs keeps the logits of a group and CLS, at most 256 tokens, in registers.
MOST_TOKENS = 256

Axis = Literal["time", "space"]


class Attention(nn.Module):
    """One divided attention: CLS attends to all tokens, a patch to CLS and to the patches along one axis.

    Args:
        width: Channels of a token, D; there are D // 64 heads.
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
            axis: `time`: a patch attends to its position in every frame; `space`: to the patches of its frame.
            keep: [B, S] bool, tokens that may be attended to; None keeps all. CLS is always kept.
            tap: Also return CLS's logits.
            residual: [B, S, D], added to the result.

        Returns:
            [B, S, D] after the output projection, and CLS's logits [B, S] as `attend_cls` gives them.
        """
        if keep is None and _fits_kernel(x, frames, axis):
            return self._attend_whole(x, frames, axis, tap, residual)
        cls, logits = self.attend_cls(x, keep, tap)
        width = x.shape[2]
        cls_kv = F.linear(x[:, 0], self.qkv.weight[width:], self.qkv.bias[width:])
        tokens = by_group(x, frames, axis)  # [B, groups, tokens, D], a group being a frame or a position
        added = None if residual is None else by_group(residual, frames, axis)
        kept = None if keep is None else by_group(keep, frames, axis)

        def attend_slice(part: slice) -> Tensor:
            mask = None if kept is None else kept[:, part]
            attended = attend_groups(self.qkv(tokens[:, part]), cls_kv, mask)
            return self.proj(attended, residual=None if added is None else added[:, part])

        first = self.proj(cls, residual=None if residual is None else residual[:, 0])
        if torch.is_grad_enabled():
            groups = "b t n d" if axis == "space" else "b n t d"
            patches = rearrange(attend_slice(slice(None)), f"{groups} -> b (t n) d")
            return torch.cat([first[:, None], patches], dim=1), logits
        result = torch.empty_like(x)
        result[:, 0] = first
        target = by_group(result, frames, axis)
        step = max(1, ROWS // (len(x) * tokens.shape[2])) if x.device.type == "cpu" else tokens.shape[1]
        for start in range(0, tokens.shape[1], step):
            part = slice(start, start + step)
            target[:, part] = attend_slice(part)
        return result, logits

    def _attend_whole(
        self, x: Tensor, frames: int, axis: Axis, tap: bool, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` on a GPU: one product for all tokens, and attention that reads it in place."""
        # Imported here, because a CPU needs no Triton.
        from egopatch.extract.encoders.layers.divided_attention import divided_attention

        qkv = self.qkv(x)
        query, key, value = rearrange(qkv, "b s (qkv h d) -> qkv b h s d", qkv=3, d=HEAD_WIDTH)
        attended = divided_attention(qkv, frames, axis)
        attended[:, 0] = F.scaled_dot_product_attention(query[:, :, :1], key, value).flatten(1)
        logits = None
        if tap:
            # The products of all heads add up to one over all channels.
            query, key, _ = qkv.chunk(3, dim=2)
            logits = torch.linalg.vecdot(key.float(), query[:, :1].float()) * (HEAD_WIDTH**-0.5 / self.heads)
        return self.proj(attended, residual=residual), logits

    def attend_cls(self, x: Tensor, keep: Tensor | None = None, tap: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attention of CLS to all tokens, before the output projection.

        CLS is a single query, so it absorbs the key projection (q W_k), and the value projection follows the pooling:
        both passes then read `x` itself, instead of keys and values strided by head.

        Args: As for `forward`.

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


def _fits_kernel(x: Tensor, frames: int, axis: Axis) -> bool:
    """Whether the kernel for GPUs computes this."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    longest = (x.shape[1] - 1) // frames if axis == "space" else frames
    return x.dtype in (torch.float16, torch.bfloat16) and longest < MOST_TOKENS and _triton_runs(x.device)


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton's kernels can run on a GPU; prints a note if they cannot."""
    if fault := triton_fault(device):
        print(f"note: attention uses PyTorch's slower kernels: {fault}", flush=True)
    return not fault


def by_group(x: Tensor, frames: int, axis: Axis) -> Tensor:
    """View the patches of `x` [B, S, ...] as [B, groups, tokens, ...]: by frame for `space`, by position for `time`."""
    groups = "b t n ..." if axis == "space" else "b n t ..."
    return rearrange(x[:, 1:], f"b (t n) ... -> {groups}", t=frames)


def attend_groups(qkv: Tensor, cls_kv: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attention of every token to the tokens of its group and to CLS.

    Args:
        qkv: [B, groups, tokens, 3*D].
        cls_kv: [B, 2*D], CLS's key and value.
        keep: [B, groups, tokens] bool, tokens that may be attended to; None keeps all. CLS is always kept.

    Returns:
        [B, groups, tokens, D].
    """
    b, groups, tokens, _ = qkv.shape
    heads = cls_kv.shape[1] // (2 * HEAD_WIDTH)
    by_head = rearrange(qkv, "b g n (qkv h d) -> qkv b g h n d", qkv=3, d=HEAD_WIDTH)
    kv = qkv.new_empty(2, b, groups, heads, 1 + tokens, HEAD_WIDTH)
    kv[..., 0, :] = rearrange(cls_kv, "b (kv h d) -> kv b 1 h d", kv=2, d=HEAD_WIDTH)
    kv[..., 1:, :] = by_head[1:]
    keys, values = rearrange(kv, "kv b g h n d -> kv (b g) h n d")
    mask = None if keep is None else rearrange(F.pad(keep, (1, 0), value=True), "b g n -> (b g) 1 1 n")
    out = attend(rearrange(by_head[0], "b g h n d -> (b g) h n d"), keys, values, mask)
    return rearrange(out, "(b g) h n d -> b g n (h d)", b=b)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q [G, H, I, 64] over k, v [G, H, J, 64]; `mask` [G, 1, 1, J] is true on allowed keys.

    On a CPU in bfloat16 without gradients this is two batched products around a bfloat16 map that fits in the cache;
    at these lengths PyTorch's flash kernel takes nearly twice as long.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or torch.is_grad_enabled() or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    g, heads, rows, _ = q.shape
    out = q.new_empty(g, rows, heads, HEAD_WIDTH).transpose(1, 2)
    step = max(1, LOGITS // (heads * rows * k.shape[2]))
    unread = q.new_empty(())  # baddbmm requires an addend, which beta=0 ignores
    for start in range(0, g, step):
        part = slice(start, start + step)
        queries, keys, values = (y[part].flatten(0, 1) for y in (q, k, v))
        logits = torch.baddbmm(unread, queries, keys.transpose(1, 2), beta=0, alpha=HEAD_WIDTH**-0.5)
        out[part] = (logits.softmax(dim=-1) @ values).view(-1, heads, rows, HEAD_WIDTH)
    return out


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
    """One block: time attention, then space attention on its result, with the residual from the block's *input*.

    Args:
        width: Channels of a token, D.
        hidden: Width of the MLP.
        eps: Epsilon of the norms; 1e-6 in EgoVLP, 1e-5 in EgoVLPv2.
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
        """[B, S, D] to [B, S, D]; see `Attention.forward` for the rest. Only space attention uses `keep`."""
        normed = self.norm1(self.timeattn(self.norm3(x), frames, "time", residual=x)[0])
        x, logits = self.attn(normed, frames, "space", keep, tap, residual=x)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.mlp(self.norm2(x), residual=x), logits
        # In place and in chunks: the hidden layer of a whole clip would determine the peak memory.
        for rows in x.flatten(0, 1).split(ROWS):
            rows.copy_(self.mlp(self.norm2(rows), residual=rows))
        return x, logits


class PatchEmbed(nn.Module):
    """Frames to patch tokens; a convolution whose stride is its kernel size, computed as one matrix product."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, 3, H, W] to [B, T*N, D]."""
        p = self.proj.kernel_size[0]
        pixels = rearrange(frames, "b t c (rows i) (cols j) -> b (t rows cols) (c i j)", i=p, j=p)
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


@dataclass(frozen=True)
class VideoSizes:
    """Sizes of a checkpoint's video network, read from its tensors.

    Attributes:
        width: Channels of a token, D.
        hidden: Width of the MLPs.
        blocks: Number of blocks.
        fusion: First block that attends to text; equal to `blocks` if none does.
        frames: Number of temporal positions.
        patches: N, patches of a frame.
        patch: Side of a patch in pixels.
    """

    width: int
    hidden: int
    blocks: int
    fusion: int
    frames: int
    patches: int
    patch: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "VideoSizes":
        """Read the sizes from a checkpoint.

        Raises:
            CheckpointError: A tensor is missing, or the sizes do not fit a space-time transformer.
        """
        conv = checkpoint.shape("video_model.patch_embed.proj.weight", 4)
        blocks = checkpoint.count(r"video_model\.blocks\.(\d+)\.")
        fused = [i for i in range(blocks) if f"video_model.blocks.{i}.attn.alpha_i2t" in checkpoint.tensors]
        sizes = cls(
            width=conv[0],
            hidden=checkpoint.shape("video_model.blocks.0.mlp.fc1.weight", 2)[0],
            blocks=blocks,
            fusion=fused[0] if fused else blocks,
            frames=checkpoint.shape("video_model.temporal_embed", 3)[1],
            patches=checkpoint.shape("video_model.pos_embed", 3)[1] - 1,
            patch=conv[2],
        )
        if sizes.width % HEAD_WIDTH or math.isqrt(sizes.patches) ** 2 != sizes.patches:
            raise CheckpointError(
                f"{checkpoint.path}: width {sizes.width} and {sizes.patches} patches; expected a width that is a "
                f"multiple of {HEAD_WIDTH} and a square grid"
            )
        return sizes

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patches of a frame."""
        side = math.isqrt(self.patches)
        return side, side


class SpaceTimeTransformer(nn.Module):
    """The video network down to a depth.

    Args:
        sizes: Sizes of the whole network.
        depth: Number of blocks.
        eps: Epsilon of the blocks' norms.
        final_eps: Epsilon of a norm after the last block; None leaves the tokens raw.
    """

    def __init__(self, sizes: VideoSizes, depth: int, eps: float, final_eps: float | None) -> None:
        super().__init__()
        width = sizes.width
        self.frames = sizes.frames
        self.patch_embed = PatchEmbed(width, sizes.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + sizes.patches, width))
        self.temporal_embed = nn.Parameter(torch.empty(1, sizes.frames, width))
        self.blocks = nn.ModuleList(SpaceTimeBlock(width, sizes.hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, final_eps) if final_eps is not None else nn.Identity()

    def positions(self) -> Tensor:
        """[1, S, D]: spatial + temporal position of every token; CLS has only a spatial one."""
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
            Tokens [B, S, D] after the last block and the final norm (if any), and CLS's mean logits [B, S] there.
        """
        x = self.embed(frames)
        last = len(self.blocks) - 1
        logits: Tensor | None = None
        for i, block in enumerate(self.blocks):
            x, logits = block(x, self.frames, tap=i == last)
        assert logits is not None
        return self.norm(x), logits
