"""`select_attend` as CUDA kernels: one program scores, selects and pools a frame for up to 16 questions of a clip.

Shape legend: C clips, B questions, T frames, N patches a frame, D channels, H attention heads, k kept patches a frame.
In a kernel: BN patches (N rounded up to a power of two), BD channels at a time, QB questions of one clip, HG heads and
their R = HG * QB columns, head-major. Products are taken with the patches first, [BN, BD] x [BD, R] and
[BD, BN] x [BN, R], since that order reaches Hopper's `wgmma` at so few queries.

Numbers: products run in the tokens' dtype (float16 for int8 and float8, which it holds exactly) and add up in float32.
The selector is split into parts that add up to its float32 value, so that the selection is that of float32 scores.
What is rounded for the second product (weights, gradients) is first divided by its column's largest value, so that
neither small gradients nor small scales underflow.
"""

# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from train.ops.select_attend.schedule import QUESTIONS, schedule

ARITHMETIC = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float16,
    torch.int8: tl.float16,
}
# Parts of the selector: 11 bits each in float16, 8 in bfloat16, 24 in float32.
PARTS = {tl.float16: 2, tl.bfloat16: 3, tl.float32: 1}
# Backward splits the frames over programs until there are about this many, one for each multiprocessor of a large GPU.
PROGRAMS = 128


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is cut: HG heads in a program, BD channels at a time, warps and stages of the pipelined loads."""

    heads: int
    channels: int
    warps: int
    stages: int


def launch_config(patches: int, width: int, heads: int, token_bytes: int, backward: bool) -> LaunchConfig:
    """The shipped configuration; `benchmarks/kernel_budget.py` checks each for spills and shared memory."""
    block = block_patches(patches)
    # One-byte tokens are widened in registers, float32 ones multiply in three parts: both need room.
    channels = {1: 32 if block > 128 else 64, 2: 64, 4: 16}[token_bytes]
    while width % channels:
        channels //= 2
    warps = 4 if block <= 64 and token_bytes < 4 else 8
    return LaunchConfig(min(2 if backward else 4, triton.next_power_of_2(heads)), channels, warps, 2)


def block_patches(patches: int) -> int:
    """BN: N rounded up to a power of two that a product takes."""
    return max(16, triton.next_power_of_2(patches))


@triton.jit
def _columns(order, first, count, group, H: tl.constexpr, QB: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    """Question, head and liveness of each of the R columns of a head group."""
    column = tl.arange(0, R)
    slot = column % QB
    head = group * (R // QB) + column // QB
    live = (slot < count) & (head < H)
    question = tl.load(order + first + slot, mask=slot < count, other=0)
    if WIDE:
        question = question.to(tl.int64)
    return question, head, live


@triton.jit
def _rows(stride_n, BN: tl.constexpr, WIDE: tl.constexpr):
    """Patch numbers [BN] and their offsets in a frame."""
    n = tl.arange(0, BN)
    if WIDE:
        return n, n.to(tl.int64) * stride_n
    return n, n * stride_n


@triton.jit
def _decode(x, ARITHMETIC: tl.constexpr, FLOAT8: tl.constexpr):
    """Tokens in the arithmetic's dtype. float8_e4m3 comes as its bits, which not every GPU can convert.

    Seven bits of exponent and fraction, moved to float16's place, are the value over 2^8, subnormals included.
    """
    if FLOAT8:
        bits = x.to(tl.int16)
        value = (((bits & 0x7F) << 7) | (bits & -32768)).to(tl.float16, bitcast=True) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
    return x.to(ARITHMETIC)


@triton.jit
def _queries(queries, selector, question, head, live, d, D: tl.constexpr, H: tl.constexpr):
    """queries + selector [BD, R] float32: with their sum, a product gives the logit less its bias."""
    q = tl.load(queries + (((question * H + head) * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
    s = tl.load(selector + ((question * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
    return q.to(tl.float32) + s.to(tl.float32)


@triton.jit
def _keep_largest(scores, n, k, N: tl.constexpr):
    """Which of scores [BN, QB] are the k largest of their column [BN, QB] int32, ties to the lowest row.

    Floats are mapped to integers of the same order and the k-th largest is built bit by bit from the top.
    """
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # one zero: -0.0 ties with 0.0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    lowest = -2147483648
    key = tl.where((n < N)[:, None], key, lowest)
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= k, 0, lowest)
    for i in range(31):
        higher = threshold | (1 << (30 - i))
        enough = tl.sum((key >= higher[None, :]).to(tl.int32), axis=0) >= k
        threshold = tl.where(enough, higher, threshold)
    needed = k - tl.sum((key > threshold[None, :]).to(tl.int32), axis=0)
    equal = (key == threshold[None, :]).to(tl.int32)
    first = tl.cumsum(equal, axis=0) <= needed[None, :]
    return tl.where(key > threshold[None, :], 1, equal * first.to(tl.int32))


@triton.jit(do_not_specialize=["k", "frames"])
def _forward_kernel(
    tokens, scale, queries, selector, bias, order, tiles, pooled, lse, kept, mask,
    k, frames, stride_c, stride_t, stride_n,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (H + HG - 1) // HG
    R: tl.constexpr = HG * QB
    tile = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    t = tl.program_id(1)
    if WIDE:
        t = t.to(tl.int64)
    clip = tl.load(tiles + tile * 3).to(tl.int64)
    first = tl.load(tiles + tile * 3 + 1)
    count = tl.load(tiles + tile * 3 + 2)
    if count == 0:
        return

    n, rows = _rows(stride_n, BN, WIDE)
    frame = tokens + clip * stride_c + t.to(tl.int64) * stride_t
    b, _b_head, b_live = _columns(order, first, count, 0, H, QB, QB, WIDE)
    question, head, live = _columns(order, first, count, group, H, QB, R, WIDE)

    # First read of the frame: scores [BN, QB] and logits [BN, R].
    s = tl.zeros((BN, QB), tl.float32)
    a = tl.zeros((BN, R), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(frame + (rows[:, None] + d[None, :]), mask=(n < N)[:, None], other=0)
        x = _decode(x, ARITHMETIC, FLOAT8)
        left = tl.load(selector + ((b * D)[None, :] + d[:, None]), mask=b_live[None, :], other=0.0).to(tl.float32)
        for _ in tl.static_range(PARTS):
            part = left.to(ARITHMETIC)
            s = tl.dot(x, part, s, input_precision=PRECISION)
            left -= part.to(tl.float32)
        q = _queries(queries, selector, question, head, live, d, D, H)
        a = tl.dot(x, q.to(ARITHMETIC), a, input_precision=PRECISION)

    row = (clip * frames + t) * N
    shift = tl.load(bias + row + n, mask=n < N, other=float("-inf")).to(tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + row + n, mask=n < N, other=0.0).to(tl.float32)
        s *= factor[:, None]
        a *= factor[:, None]
    keep = _keep_largest(s + shift[:, None], n, k, N)
    if group == 0:
        out = b * frames + t
        place = tl.cumsum(keep, axis=0) - 1
        chosen = (keep > 0) & b_live[None, :]
        tl.store(kept + ((out * k)[None, :] + place), tl.broadcast_to(n.to(tl.int64)[:, None], (BN, QB)), mask=chosen)
        tl.store(mask + ((out * N)[None, :] + n[:, None]), keep.to(tl.int8), mask=(n < N)[:, None] & b_live[None, :])

    chosen = tl.reshape(tl.broadcast_to(keep[:, None, :], (BN, HG, QB)), (BN, R))
    a = tl.where(chosen > 0, a + shift[:, None], float("-inf"))
    top = tl.max(a, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp(a - top[None, :])
    total = tl.sum(p, axis=0)
    out = (question * frames + t) * H + head
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(lse + out, tl.where(empty, float("-inf"), top + tl.log(total)), mask=live)
    p *= (1.0 / total)[None, :]
    largest = 1.0
    if HAS_SCALE:
        largest = tl.max(tl.abs(factor), axis=0)
        largest = tl.where(largest == 0.0, 1.0, largest)
        p *= (factor / largest)[:, None]
    weights = p.to(ARITHMETIC)

    # Second read, from the L2 cache: pooled [BD, R].
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(frame + (rows[None, :] + d[:, None]), mask=(n < N)[None, :], other=0)
        o = tl.dot(_decode(x, ARITHMETIC, FLOAT8), weights, input_precision=PRECISION) * largest
        tl.store(pooled + ((out * D)[None, :] + d[:, None]), o.to(pooled.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=["frames", "questions", "span"])
def _backward_kernel(
    grad_pooled, grad_lse, tokens, scale, queries, selector, bias, order, tiles, lse, mask, grad_queries, grad_bias,
    frames, questions, span, stride_c, stride_t, stride_n,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (H + HG - 1) // HG
    R: tl.constexpr = HG * QB
    tile = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    split = tl.program_id(1)
    clip = tl.load(tiles + tile * 3).to(tl.int64)
    first = tl.load(tiles + tile * 3 + 1)
    count = tl.load(tiles + tile * 3 + 2)
    if count == 0:
        return

    n, rows = _rows(stride_n, BN, WIDE)
    question, head, live = _columns(order, first, count, group, H, QB, R, WIDE)
    start = split * span
    for i in range(0, tl.minimum(span, frames - start)):
        t = start + i
        if WIDE:
            t = t.to(tl.int64)
        frame = tokens + clip * stride_c + t.to(tl.int64) * stride_t
        out = (question * frames + t) * H + head

        grad_top = tl.zeros((R,), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            g = tl.load(grad_pooled + ((out * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
            grad_top = tl.maximum(grad_top, tl.max(tl.abs(g.to(tl.float32)), axis=0))
        grad_top = tl.where(grad_top == 0.0, 1.0, grad_top)

        # First read of the frame: logits and products with the pooled gradient, both [BN, R].
        a = tl.zeros((BN, R), tl.float32)
        products = tl.zeros((BN, R), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = tl.load(frame + (rows[:, None] + d[None, :]), mask=(n < N)[:, None], other=0)
            x = _decode(x, ARITHMETIC, FLOAT8)
            q = _queries(queries, selector, question, head, live, d, D, H)
            a = tl.dot(x, q.to(ARITHMETIC), a, input_precision=PRECISION)
            g = tl.load(grad_pooled + ((out * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
            g = g.to(tl.float32) * (1.0 / grad_top)[None, :]
            products = tl.dot(x, g.to(ARITHMETIC), products, input_precision=PRECISION)

        row = (clip * frames + t) * N
        shift = tl.load(bias + row + n, mask=n < N, other=float("-inf")).to(tl.float32)
        products *= grad_top[None, :]
        if HAS_SCALE:
            factor = tl.load(scale + row + n, mask=n < N, other=0.0).to(tl.float32)
            a *= factor[:, None]
            products *= factor[:, None]
        chosen = tl.load(
            mask + (((question * frames + t) * N)[None, :] + n[:, None]), mask=(n < N)[:, None] & live[None, :], other=0
        )
        log_total = tl.load(lse + out, mask=live, other=0.0)
        log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
        p = tl.where(chosen > 0, tl.exp(a + shift[:, None] - log_total[None, :]), 0.0)
        direct = tl.load(grad_lse + out, mask=live, other=0.0).to(tl.float32)
        mean = tl.sum(p * products, axis=0)
        # Where p is 0 the gradient is 0, whatever an infinite lse made of grad_lse.
        grad = tl.where(p > 0.0, p * ((products - mean[None, :]) + direct[None, :]), 0.0)
        partial = (tl.program_id(0).to(tl.int64) * frames + t) * N
        tl.store(grad_bias + partial + n, tl.sum(grad, axis=1), mask=n < N)

        if HAS_SCALE:
            grad *= factor[:, None]
        top = tl.max(tl.abs(grad), axis=0)
        top = tl.where(top == 0.0, 1.0, top)
        weights = (grad * (1.0 / top)[None, :]).to(ARITHMETIC)

        # Second read, from the L2 cache. The frames of a program add up in turn, so that repeats are bit-equal.
        target = ((split * questions + question) * H + head) * D
        earlier = live & (tl.zeros((R,), tl.int32) + i > 0)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = tl.load(frame + (rows[None, :] + d[:, None]), mask=(n < N)[None, :], other=0)
            pointers = grad_queries + (target[None, :] + d[:, None])
            o = tl.dot(_decode(x, ARITHMETIC, FLOAT8), weights, input_precision=PRECISION) * top[None, :]
            o += tl.load(pointers, mask=earlier[None, :], other=0.0)
            tl.store(pointers, o, mask=live[None, :])
        tl.debug_barrier()  # the next frame's loads see this one's stores, whichever thread made them


@triton.jit
def _bias_kernel(partials, clip_tiles, grad_bias, frames, N: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr):
    """Sum the partial bias gradients of a clip's programs in a fixed order."""
    clip = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    first = tl.load(clip_tiles + clip).to(tl.int64) * GROUPS
    last = tl.load(clip_tiles + clip + 1).to(tl.int64) * GROUPS
    for i in range(0, last - first):
        total += tl.load(partials + ((first + i) * frames + t) * N + n, mask=n < N, other=0.0)
    tl.store(grad_bias + (clip.to(tl.int64) * frames + t) * N + n, total, mask=n < N)


def forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of `select_attend` and what `backward` takes.

    Returns:
        pooled [B, T, H, D], lse [B, T, H], kept [B, T, k], mask [B, T, N] int8 of the kept patches, and the schedule:
        order [B], tiles [G, 3] and clip_tiles [C + 1], all int32, as `schedule` gives them.
    """
    _, frames, patches, width = tokens.shape
    questions, heads, _ = queries.shape
    # Checked on the device, since reading the answer here would wait for it.
    torch._assert_async(
        ((clip_index >= 0) & (clip_index < len(tokens))).all(), f"clip_index is not within 0 to {len(tokens) - 1}"
    )
    order, tiles, clip_tiles = schedule(clip_index, len(tokens))
    pooled = torch.empty(questions, frames, heads, width, dtype=queries.dtype, device=tokens.device)
    lse = torch.empty(questions, frames, heads, dtype=torch.float32, device=tokens.device)
    kept = torch.empty(questions, frames, k, dtype=torch.int64, device=tokens.device)
    mask = torch.empty(questions, frames, patches, dtype=torch.int8, device=tokens.device)
    config = launch_config(patches, width, heads, tokens.element_size(), backward=False)
    if pooled.numel():
        arithmetic = _arithmetic(tokens)
        _forward_kernel[(len(tiles) * triton.cdiv(heads, config.heads), frames)](
            _bits(tokens), scale, queries.contiguous(), selector.contiguous(), bias.contiguous(), order, tiles,
            pooled, lse, kept, mask, k, frames, *tokens.stride()[:3],
            PARTS=PARTS[arithmetic], **constants(tokens, queries, scale, config),
        )  # fmt: skip
    return pooled, lse, kept, mask, order, tiles, clip_tiles


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
    """Gradients of queries [B, H, D], selector [B, D] and bias [C, T, N], all float32."""
    clips, frames, patches, width = tokens.shape
    questions, heads, _ = queries.shape
    config = launch_config(patches, width, heads, tokens.element_size(), backward=True)
    programs = len(tiles) * triton.cdiv(heads, config.heads)
    splits = max(1, min(frames, PROGRAMS // max(1, programs)))
    span = triton.cdiv(frames, splits)
    splits = triton.cdiv(frames, span) if span else 0
    grad_bias = torch.zeros(clips, frames, patches, dtype=torch.float32, device=tokens.device)
    grad_queries = torch.empty(splits, questions, heads, width, dtype=torch.float32, device=tokens.device)
    if grad_pooled.numel():
        partials = torch.empty(programs, frames, patches, dtype=torch.float32, device=tokens.device)
        _backward_kernel[(programs, splits)](
            grad_pooled.contiguous(), grad_lse.contiguous(), _bits(tokens), scale, queries.contiguous(),
            selector.contiguous(), bias.contiguous(), order, tiles, lse, mask, grad_queries, partials,
            frames, questions, span, *tokens.stride()[:3], **constants(tokens, queries, scale, config),
        )  # fmt: skip
        _bias_kernel[(clips, frames)](
            partials, clip_tiles, grad_bias, frames,
            N=patches, GROUPS=programs // len(tiles), BN=block_patches(patches), num_warps=4,
        )  # fmt: skip
    total = grad_queries[0] if splits == 1 else grad_queries.sum(dim=0)
    return total, total.sum(dim=1), grad_bias


def _bits(tokens: Tensor) -> Tensor:
    return tokens.view(torch.int8) if tokens.dtype == torch.float8_e4m3fn else tokens


def _arithmetic(tokens: Tensor) -> tl.dtype:
    # Triton's interpreter gets bfloat16 wrong without saying so; float32 holds it exactly.
    if knobs.runtime.interpret and tokens.dtype == torch.bfloat16:
        return tl.float32
    return ARITHMETIC[tokens.dtype]


def constants(tokens: Tensor, queries: Tensor, scale: Tensor | None, config: LaunchConfig) -> dict[str, object]:
    """Compile-time arguments that both kernels take, and their warps and stages."""
    patches, width = tokens.shape[2:]
    questions, heads = queries.shape[:2]
    return {
        "N": patches,
        "D": width,
        "H": heads,
        "HAS_SCALE": scale is not None,
        # 64-bit offsets cost registers; only tensors of this size, or such a stride between patches, need them.
        "WIDE": max(patches * tokens.stride(2), questions * tokens.shape[1] * max(patches, heads * width)) >= 2**31,
        "FLOAT8": tokens.dtype == torch.float8_e4m3fn,
        "ARITHMETIC": _arithmetic(tokens),
        "PRECISION": "tf32x3",
        "BN": block_patches(patches),
        "BD": config.channels,
        "QB": QUESTIONS,
        "HG": config.heads,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
