"""Launches the CUDA kernels. A program scores, selects and pools a frame for up to 16 questions of a clip.

Shape legend: C clips, S clips that `tokens` holds, B questions, T frames, N patches a frame, D channels, H attention
heads. In a kernel: BN patches at a time (a power of two), BD channels at a time, QB questions of one clip, HG heads and
their R = HG * QB columns, head-major. Products are taken with the patches first, [BN, BD] x [BD, R] and
[BD, BN] x [BN, R], since that order reaches Hopper's `wgmma` at so few queries. Rows of scores and of the mask of kept
patches are PITCH numbers apart, `row_pitch(N)`.

Precision: products run in the tokens' dtype (float16 for int8 and float8, which it represents exactly) and add up in
float32. The selector is split into parts that add up to its float32 value, so that the selection is that of float32
scores. Weights and gradients are divided by their column's largest value before they are rounded for the second
product, so that neither small gradients nor small scales underflow.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from egopatch.train.ops.select_attend.backward import bias_kernel, logits_kernel, queries_kernel
from egopatch.train.ops.select_attend.columns import columns_kernel
from egopatch.train.ops.select_attend.forward import forward_blocks_kernel, forward_kernel, kept_kernel
from egopatch.train.ops.select_attend.plan import ALIGNMENT, QUESTIONS, Blocks, Launch, plan_launch, row_pitch
from egopatch.train.ops.select_attend.schedule import schedule

ARITHMETIC = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
    torch.float8_e4m3fn: torch.float16,
    torch.int8: torch.float16,
}
IN_TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Parts of the selector: 11 bits each in float16, 8 in bfloat16, 24 in float32.
PARTS = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 1}
# Backward keeps the gradients of the logits of as many tiles at a time as fit in this.
SCRATCH_BYTES = 64 * 2**20
# Scores that a program turns into kept patches.
KEPT_SCORES = 2048
# Least size that gradients are divided by: the inverse of a number below 2^-128 is infinite, and zero times it is NaN.
SMALLEST = 2.0**-100


def forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    ks: Tensor,
    listed: int,
    scale: Tensor | None,
    clip_rows: Tensor | None,
    stacked: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of `select_attend`, and the tensors that `backward` needs.

    Questions about clip c keep ks[c] patches of a frame, for ks [C] int32; `kept` lists the first `listed` of them. The
    questions of `stacked` heads follow each other. pooled has `dtype`; it and lse are in the order in which the product
    with each head's values reads them and returns their gradients, so that neither is copied.

    Returns:
        pooled [M, H, B / M, T, D], lse [M, H, B / M, T], kept [B, T, listed], mask int8 of the kept patches,
        [B, T, row_pitch(N)] with zeros beyond N, and the schedule: order [B], tiles [G, 4] and clip_tiles [C, 2], as
        `schedule` gives them.
    """
    _, frames, patches, width = tokens.shape
    (questions, heads, _), pitch = queries.shape, row_pitch(patches)
    order, tiles, clip_tiles = schedule(clip_index, len(bias), clip_rows, len(tokens))
    blocks, device = launch_of(tokens, queries).forward, tokens.device
    several, groups = patches > blocks.block, triton.cdiv(heads, blocks.heads)
    # Several blocks add up in pooled itself, which must then be float32.
    written = torch.float32 if several else dtype
    each = questions // stacked
    pooled = torch.empty(stacked, heads, each, frames, width, dtype=written, device=device)
    lse = torch.empty(stacked, heads, each, frames, dtype=torch.float32, device=device)
    kept = torch.empty(questions, frames, listed, dtype=torch.int64, device=device)
    mask = torch.empty(questions, frames, pitch, dtype=torch.int8, device=device)
    if pooled.numel():
        made = make_columns(tokens, queries, selector, order, tiles, PARTS[arithmetic_of(tokens)])
        columns, column_scale, selectors, selector_scale = made
        selects = 1 if several else groups
        scores = torch.empty(selects, questions, frames, pitch, dtype=torch.float32, device=device)
        cuts = torch.empty(questions, frames, 2, dtype=torch.int32, device=device)
        arguments = (
            describe_tokens(tokens, blocks.block, blocks.channels),
            describe_tokens(tokens, blocks.block, blocks.pool_channels),
            TensorDescriptor.from_tensor(columns, [blocks.heads * QUESTIONS, blocks.channels]),
            TensorDescriptor.from_tensor(selectors, [QUESTIONS, blocks.channels]),
            column_scale, selector_scale, None if scale is None else scale.contiguous(), bias.contiguous(),
            order, tiles, pooled, lse, scores, cuts, ks, frames, questions, each,
        )  # fmt: skip
        kernel = forward_blocks_kernel if several else forward_kernel
        kernel[(len(tiles) * frames * selects,)](*arguments, **forward_constants(tokens, queries, scale, blocks))
        whole = triton.next_power_of_2(pitch)
        rows = max(1, KEPT_SCORES // whole)
        kept_kernel[(triton.cdiv(questions * frames, rows),)](
            scores, cuts, kept, mask, listed, questions * frames,
            N=patches, PITCH=pitch, BN=whole, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return pooled.to(dtype), lse, kept, mask, order, tiles, clip_tiles


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [B, H, D], selector [B, D] and bias [C, T, N], all float32.

    `grad_pooled` and `grad_lse` are in the order of `forward`'s outputs.
    """
    _, frames, patches, width = tokens.shape
    questions, heads, _ = queries.shape
    launch, device = launch_of(tokens, queries), tokens.device
    blocks, product = launch.backward, launch.product
    grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=device)
    if not grad_pooled.numel():
        return torch.zeros(queries.shape, device=device), torch.zeros(selector.shape, device=device), grad_bias
    groups, columns_of_group = triton.cdiv(heads, blocks.heads), blocks.heads * QUESTIONS
    columns, column_scale, _, _ = make_columns(tokens, queries, selector, order, tiles, parts=0)
    arithmetic, padded = arithmetic_of(tokens), padded_patches(tokens)
    tile_bytes = frames * groups * columns_of_group * padded * arithmetic.itemsize
    at_once = min(len(tiles), max(1, SCRATCH_BYTES // tile_bytes))
    weights = torch.empty(at_once * frames * groups * columns_of_group, padded, dtype=arithmetic, device=device)
    tops_shape = (at_once, frames, groups, triton.cdiv(patches, blocks.block), columns_of_group)
    tops = torch.empty(*tops_shape, dtype=torch.float32, device=device)
    partials = torch.empty(len(tiles), groups, frames, patches, dtype=torch.float32, device=device)
    grad_queries = torch.empty(questions, heads, width, dtype=torch.float32, device=device)
    # Infinite norm: the largest size of each row, which is divided out before the gradient is rounded.
    grad_tops = torch.linalg.vector_norm(grad_pooled, math.inf, dim=-1, dtype=torch.float32).clamp_min_(SMALLEST)
    inputs = (
        describe_tokens(tokens, blocks.block, blocks.channels),
        TensorDescriptor.from_tensor(columns, [columns_of_group, blocks.channels]),
        column_scale, grad_pooled.contiguous(), grad_tops, grad_lse.contiguous(),
        None if scale is None else scale.contiguous(), bias.contiguous(), order, tiles, lse, mask,
        weights, tops, partials, frames, grad_lse.shape[2],
    )  # fmt: skip
    products = (
        describe_tokens(tokens, product.patches, product.channels),
        TensorDescriptor.from_tensor(weights, [product.rows, product.patches]),
        tops, order, tiles, grad_queries, frames,
    )  # fmt: skip
    spans = triton.cdiv(width, product.channels) * (groups * columns_of_group // product.rows)
    for first in range(0, len(tiles), at_once):
        count = min(at_once, len(tiles) - first)
        logits_kernel[(count * frames * groups,)](*inputs, first, **logits_constants(tokens, queries, scale, blocks))
        queries_kernel[(count * spans,)](*products, first, **product_constants(tokens, queries, launch))
    bias_kernel[(len(bias), frames)](
        partials, clip_tiles, grad_bias, frames,
        N=patches, GROUPS=groups, BN=triton.next_power_of_2(patches), num_warps=4,
    )  # fmt: skip
    return grad_queries, grad_queries.sum(dim=1), grad_bias


def launch_of(tokens: Tensor, queries: Tensor) -> Launch:
    """Sizes of the kernels' blocks for these arguments on their device."""
    # The interpreter runs what an H100 would.
    generation = torch.cuda.get_device_capability(tokens.device)[0] if tokens.is_cuda else 9
    return plan_launch(tokens.shape[2], tokens.shape[3], queries.shape[1], tokens.element_size(), generation)


def make_columns(
    tokens: Tensor, queries: Tensor, selector: Tensor, order: Tensor, tiles: Tensor, parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns [G * H * 16, D], their scale [G * H * 16], selectors [G * parts * 16, D] and their scale [G * 16].

    As `columns_kernel` describes them.
    """
    _, heads, width = queries.shape
    arithmetic, device = arithmetic_of(tokens), tokens.device
    slots = len(tiles) * QUESTIONS
    columns = torch.empty(slots * heads, width, dtype=arithmetic, device=device)
    column_scale = torch.empty(slots * heads, dtype=torch.float32, device=device)
    selectors = torch.empty(slots * parts, width, dtype=arithmetic, device=device)
    selector_scale = torch.empty(slots, dtype=torch.float32, device=device)
    columns_kernel[(len(tiles), QUESTIONS)](
        queries.contiguous(), selector.contiguous(), order, tiles, columns, column_scale, selectors, selector_scale,
        D=width, H=heads, PARTS=parts, QB=QUESTIONS, WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return columns, column_scale, selectors, selector_scale


def padded_patches(tokens: Tensor) -> int:
    """Padded row length of the logits' gradients: the copy engine needs rows that begin at multiples of 16 bytes."""
    per_row = ALIGNMENT // arithmetic_of(tokens).itemsize
    return triton.cdiv(tokens.shape[2], per_row) * per_row


def describe_tokens(tokens: Tensor, patches: int, channels: int) -> TensorDescriptor:
    """The descriptor by which the GPU's copy engine reads [patches, channels] of a frame; float8 tokens as bits."""
    bits = tokens.view(torch.int8) if tokens.dtype == torch.float8_e4m3fn else tokens
    width = tokens.shape[3]
    # A dimension of one row may have any stride, which the engine would refuse.
    strides = [stride if size > 1 else width for stride, size in zip(bits.stride()[:3], bits.shape, strict=False)]
    return TensorDescriptor(bits, list(bits.shape), [*strides, 1], [1, 1, patches, channels])


def arithmetic_of(tokens: Tensor) -> torch.dtype:
    """Dtype of the products."""
    # Triton's interpreter computes wrong results in bfloat16; float32 represents it exactly.
    if knobs.runtime.interpret and tokens.dtype == torch.bfloat16:
        return torch.float32
    return ARITHMETIC[tokens.dtype]


def forward_constants(tokens: Tensor, queries: Tensor, scale: Tensor | None, blocks: Blocks) -> dict[str, object]:
    """Compile-time arguments of the forward kernels."""
    return _constants(tokens, queries, scale, blocks) | {
        "PARTS": PARTS[arithmetic_of(tokens)],
        "CHUNK": blocks.chunk,
        "POOL_BD": blocks.pool_channels,
        "POOL_STAGES": blocks.pool_stages,
    }


def logits_constants(tokens: Tensor, queries: Tensor, scale: Tensor | None, blocks: Blocks) -> dict[str, object]:
    """Compile-time arguments of `logits_kernel`."""
    return _constants(tokens, queries, scale, blocks) | {"PADDED": padded_patches(tokens), "SMALLEST": SMALLEST}


def _constants(tokens: Tensor, queries: Tensor, scale: Tensor | None, blocks: Blocks) -> dict[str, object]:
    return (
        _shared(tokens, queries, blocks)
        | ({"maxnreg": blocks.registers} if blocks.registers else {})
        | {
            "PITCH": row_pitch(tokens.shape[2]),
            "HAS_SCALE": scale is not None,
            "BD": blocks.channels,
            "STAGES": blocks.stages,
            "num_warps": blocks.warps,
        }
    )


def product_constants(tokens: Tensor, queries: Tensor, launch: Launch) -> dict[str, object]:
    """Compile-time arguments of `queries_kernel`."""
    product = launch.product
    return _shared(tokens, queries, launch.backward) | {
        "ROWS": product.rows,
        "BK": product.patches,
        "BD": product.channels,
        "STAGES": product.stages,
        "num_warps": product.warps,
    }


def _shared(tokens: Tensor, queries: Tensor, blocks: Blocks) -> dict[str, object]:
    patches, width = tokens.shape[2:]
    return {
        "N": patches,
        "D": width,
        "H": queries.shape[1],
        "FLOAT8": tokens.dtype == torch.float8_e4m3fn,
        "ARITHMETIC": IN_TRITON[arithmetic_of(tokens)],
        "PRECISION": "tf32x3",
        "BN": blocks.block,
        "QB": QUESTIONS,
        "HG": blocks.heads,
    }
