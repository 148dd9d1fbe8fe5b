"""Backward kernels of `select_attend`.

Legend in `kernels.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from egopatch.train.ops.select_attend import parts


@triton.jit
def _weigh(
    grad_pooled, frame, scale, queries, selector, bias, lse, mask, question, head, live, grad_top, n, offsets,
    clip, row, t, frames,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr, FLOAT8: tl.constexpr,
    ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """First read of a block of patches: softmax weights and products with the pooled gradient, both [BN, R]."""
    out = (question * frames + t) * H + head
    a = tl.zeros((BN, R), tl.float32)
    products = tl.zeros((BN, R), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(frame + (offsets[:, None] + d[None, :]), mask=(n < N)[:, None], other=0)
        x = parts.decode(x, ARITHMETIC, FLOAT8)
        q = parts.queries(queries, selector, question, head, live, d, D, H)
        a = tl.dot(x, q.to(ARITHMETIC), a, input_precision=PRECISION)
        g = tl.load(grad_pooled + ((out * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
        g = g.to(tl.float32) * (1.0 / grad_top)[None, :]
        products = tl.dot(x, g.to(ARITHMETIC), products, input_precision=PRECISION)

    shift = parts.by_patch(bias, (clip * frames + t) * N, n, N, float("-inf"))
    products *= grad_top[None, :]
    if HAS_SCALE:
        factor = parts.by_patch(scale, (row * frames + t) * N, n, N, 0.0)
        a *= factor[:, None]
        products *= factor[:, None]
    chosen = parts.chosen(mask, question, frames, t, n, live, N)
    log_total = tl.load(lse + out, mask=live, other=0.0)
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
    return tl.where(chosen, tl.exp(a + shift[:, None] - log_total[None, :]), 0.0), products


@triton.jit(do_not_specialize=["frames", "questions", "span"])
def backward_kernel(
    grad_pooled, grad_lse, tokens, scale, queries, selector, bias, order, tiles, lse, mask, grad_queries, grad_bias,
    frames, questions, span, stride_c, stride_t, stride_n,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr,
):  # fmt: skip
    """Gradients of several frames. A program computes up to QB questions of a clip and HG heads."""
    groups: tl.constexpr = (H + HG - 1) // HG
    R: tl.constexpr = HG * QB
    blocks: tl.constexpr = (N + BN - 1) // BN
    passes: tl.constexpr = 1 if blocks == 1 else 2
    group = tl.program_id(0) % groups
    split = tl.program_id(1)
    clip, first, count, row = parts.tile_of(tiles, tl.program_id(0) // groups)
    if count == 0:
        return

    question, head, live = parts.columns(order, first, count, group, H, QB, R, WIDE)
    first_frame = split * span
    for i in range(0, tl.minimum(span, frames - first_frame)):
        t = first_frame + i
        if WIDE:
            t = t.to(tl.int64)
        frame = tokens + row * stride_c + t.to(tl.int64) * stride_t
        out = (question * frames + t) * H + head

        grad_top = tl.zeros((R,), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            g = tl.load(grad_pooled + ((out * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
            grad_top = tl.maximum(grad_top, tl.max(tl.abs(g.to(tl.float32)), axis=0))
        grad_top = tl.where(grad_top == 0.0, 1.0, grad_top)

        # Several blocks take two passes, the first for the mean of the (rounded) products over all of them.
        # <grad_pooled, pooled> equals that mean too, but does not cancel their rounding, nor lse that of the weights.
        mean = tl.zeros((R,), tl.float32)
        total = tl.zeros((R,), tl.float32)
        for step in range(0, blocks * passes):
            start = (step % blocks) * BN
            n, offsets = parts.patches(start, stride_n, BN, WIDE)
            p, products = _weigh(
                grad_pooled, frame, scale, queries, selector, bias, lse, mask, question, head, live, grad_top,
                n, offsets, clip, row, t, frames,
                N, D, H, HAS_SCALE, FLOAT8, ARITHMETIC, PRECISION, BN, BD, R,
            )  # fmt: skip
            if passes == 1:
                total = tl.sum(p, axis=0)
                p = p / tl.where(total == 0.0, 1.0, total)[None, :]
                mean = tl.sum(p * products, axis=0)
            elif step < blocks:
                total += tl.sum(p, axis=0)
                mean += tl.sum(p * products, axis=0)
            if passes == 1 or step >= blocks:
                if passes > 1:
                    share = 1.0 / tl.where(total == 0.0, 1.0, total)
                    p *= share[None, :]
                    products -= (mean * share)[None, :]
                else:
                    products -= mean[None, :]
                direct = tl.load(grad_lse + out, mask=live, other=0.0).to(tl.float32)
                # Where p is 0 the gradient is 0, even if an infinite lse made grad_lse infinite or NaN.
                grad = tl.where(p > 0.0, p * (products + direct[None, :]), 0.0)
                partial = (tl.program_id(0).to(tl.int64) * frames + t) * N
                tl.store(grad_bias + partial + n, tl.sum(grad, axis=1), mask=n < N)

                if HAS_SCALE:
                    grad *= parts.by_patch(scale, (row * frames + t) * N, n, N, 0.0)[:, None]
                top = tl.max(tl.abs(grad), axis=0)
                top = tl.where(top == 0.0, 1.0, top)
                weights = (grad * (1.0 / top)[None, :]).to(ARITHMETIC)

                # Second read, from the L2 cache. Blocks and frames add up in order, so that repeats are bit-equal.
                target = ((split * questions + question) * H + head) * D
                written = live & (tl.zeros((R,), tl.int32) + i + start > 0)
                for d0 in range(0, D, BD):
                    d = d0 + tl.arange(0, BD)
                    x = tl.load(frame + (offsets[None, :] + d[:, None]), mask=(n < N)[None, :], other=0)
                    pointers = grad_queries + (target[None, :] + d[:, None])
                    o = tl.dot(parts.decode(x, ARITHMETIC, FLOAT8), weights, input_precision=PRECISION) * top[None, :]
                    o += tl.load(pointers, mask=written[None, :], other=0.0)
                    tl.store(pointers, o, mask=live[None, :])
                tl.debug_barrier()  # the next iteration loads values that other threads stored here


@triton.jit
def bias_kernel(partials, clip_tiles, grad_bias, frames, N: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr):
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
