"""Launches the CUDA kernels. A program scores, selects and pools a frame for up to 16 questions of a clip.

Shape legend: C clips, S clips that `tokens` holds, B questions, T frames, N patches a frame, D channels, H attention
heads, k kept patches a frame. In a kernel: BN patches at a time (a power of two), BD channels at a time, QB questions
of one clip, HG heads and their R = HG * QB columns, head-major. Products are taken with the patches first,
[BN, BD] x [BD, R] and [BD, BN] x [BN, R], since that order reaches Hopper's `wgmma` at so few queries.

Precision: products run in the tokens' dtype (float16 for int8 and float8, which it represents exactly) and add up in
float32. The selector is split into parts that add up to its float32 value, so that the selection is that of float32
scores. Weights and gradients are divided by their column's largest value before they are rounded for the second
product, so that neither small gradients nor small scales underflow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from egopatch.train.ops.select_attend.backward import backward_kernel, bias_kernel
from egopatch.train.ops.select_attend.forward import forward_blocks_kernel, forward_kernel
from egopatch.train.ops.select_attend.plan import QUESTIONS, Blocks, Launch, schedule

ARITHMETIC = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float16,
    torch.int8: tl.float16,
}
# Parts of the selector: 11 bits each in float16, 8 in bfloat16, 24 in float32.
PARTS = {tl.float16: 2, tl.bfloat16: 3, tl.float32: 1}
# Backward splits the frames until there are about this many programs, one for each multiprocessor of a large GPU.
PROGRAMS = 128


def forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
    clip_rows: Tensor | None,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of `select_attend`, and the tensors that `backward` needs.

    Returns:
        pooled [B, T, H, D], lse [B, T, H], kept [B, T, k], mask [B, T, N] int8 of the kept patches, and the schedule:
        order [B], tiles [G, 4] and clip_tiles [C + 1], all int32, as `schedule` gives them.
    """
    _, frames, patches, width = tokens.shape
    questions, heads, _ = queries.shape
    _assert_below(clip_index, len(bias), "clip_index")
    if clip_rows is not None:
        _assert_below(clip_rows, len(tokens), "clip_rows")
    order, tiles, clip_tiles = schedule(clip_index, len(bias), clip_rows)
    blocks = launch.forward
    # Several blocks add up in pooled itself, which must then be float32.
    dtype = torch.float32 if blocks.several else queries.dtype
    pooled = torch.empty(questions, frames, heads, width, dtype=dtype, device=tokens.device)
    lse = torch.empty(questions, frames, heads, dtype=torch.float32, device=tokens.device)
    kept = torch.empty(questions, frames, k, dtype=torch.int64, device=tokens.device)
    mask = torch.empty(questions, frames, patches, dtype=torch.int8, device=tokens.device)
    if pooled.numel():
        arguments = (
            *_inputs(tokens, scale, queries, selector, bias), order, tiles, pooled, lse, kept, mask,
            k, frames, *tokens.stride()[:3],
        )  # fmt: skip
        fixed = forward_constants(tokens, queries, scale, launch)
        if blocks.several:
            forward_blocks_kernel[(len(tiles), frames)](*arguments, **fixed)
        else:
            forward_kernel[(len(tiles) * triton.cdiv(heads, blocks.heads), frames)](*arguments, **fixed)
    return pooled.to(queries.dtype), lse, kept, mask, order, tiles, clip_tiles


def backward(
    grad_pooled: Tensor,
    grad_lse: Tensor,
    tokens: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    lse: Tensor,
    mask: Tensor,
    order: Tensor,
    tiles: Tensor,
    clip_tiles: Tensor,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [B, H, D], selector [B, D] and bias [C, T, N], all float32."""
    _, frames, patches, width = tokens.shape
    questions, heads, _ = queries.shape
    programs = len(tiles) * triton.cdiv(heads, launch.backward.heads)
    splits = max(1, min(frames, PROGRAMS // max(1, programs)))
    span = triton.cdiv(frames, splits)
    splits = triton.cdiv(frames, span) if span else 0
    grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=tokens.device)
    grad_queries = torch.empty(splits, questions, heads, width, dtype=torch.float32, device=tokens.device)
    if grad_pooled.numel():
        partials = torch.empty(programs, frames, patches, dtype=torch.float32, device=tokens.device)
        backward_kernel[(programs, splits)](
            grad_pooled.contiguous(), grad_lse.contiguous(), *_inputs(tokens, scale, queries, selector, bias),
            order, tiles, lse, mask, grad_queries, partials,
            frames, questions, span, *tokens.stride()[:3], **backward_constants(tokens, queries, scale, launch),
        )  # fmt: skip
        bias_kernel[(len(bias), frames)](
            partials, clip_tiles, grad_bias, frames,
            N=patches, GROUPS=programs // len(tiles), BN=launch.backward.select_block, num_warps=4,
        )  # fmt: skip
    total = grad_queries[0] if splits == 1 else grad_queries.sum(dim=0)
    return total, total.sum(dim=1), grad_bias


def _assert_below(index: Tensor, end: int, name: str) -> None:
    """Check on the device, since reading the result here would wait for it."""
    torch._assert_async(((index >= 0) & (index < end)).all(), f"{name} is not within 0 to {end - 1}")


def _inputs(
    tokens: Tensor, scale: Tensor | None, queries: Tensor, selector: Tensor, bias: Tensor
) -> tuple[Tensor | None, ...]:
    """The kernels' inputs: tokens with any strides, float8 ones as their bits, and everything else contiguous."""
    bits = tokens.view(torch.int8) if tokens.dtype == torch.float8_e4m3fn else tokens
    factors = None if scale is None else scale.contiguous()
    return bits, factors, queries.contiguous(), selector.contiguous(), bias.contiguous()


def _arithmetic(tokens: Tensor) -> tl.dtype:
    # Triton's interpreter computes wrong results in bfloat16; float32 represents it exactly.
    if knobs.runtime.interpret and tokens.dtype == torch.bfloat16:
        return tl.float32
    return ARITHMETIC[tokens.dtype]


def forward_constants(tokens: Tensor, queries: Tensor, scale: Tensor | None, launch: Launch) -> dict[str, object]:
    """Compile-time arguments of the forward kernel."""
    blocks = launch.forward
    fixed = {**_constants(tokens, queries, scale, launch, blocks), "PARTS": PARTS[_arithmetic(tokens)]}
    if blocks.several:
        fixed |= {"SELECT_BN": blocks.select_block, "SELECT_BD": blocks.select_channels}
    return fixed


def backward_constants(tokens: Tensor, queries: Tensor, scale: Tensor | None, launch: Launch) -> dict[str, object]:
    """Compile-time arguments of the backward kernel."""
    return _constants(tokens, queries, scale, launch, launch.backward)


def _constants(
    tokens: Tensor, queries: Tensor, scale: Tensor | None, launch: Launch, blocks: Blocks
) -> dict[str, object]:
    """Compile-time arguments of both kernels, and their warps and stages."""
    patches, width = tokens.shape[2:]
    return {
        "N": patches,
        "D": width,
        "H": queries.shape[1],
        "HAS_SCALE": scale is not None,
        "WIDE": launch.wide,
        "FLOAT8": tokens.dtype == torch.float8_e4m3fn,
        "ARITHMETIC": _arithmetic(tokens),
        "PRECISION": "tf32x3",
        "BN": blocks.block,
        "BD": blocks.channels,
        "QB": QUESTIONS,
        "HG": blocks.heads,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
