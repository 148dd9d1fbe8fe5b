"""Forward kernels of `select_attend`: one for frames of one block, one for frames of several blocks.

Legend in `kernels.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from egopatch.train.ops.select_attend import parts


@triton.jit(do_not_specialize=["k", "frames"])
def forward_kernel(
    tokens, scale, queries, selector, bias, order, tiles, pooled, lse, kept, mask,
    k, frames, stride_c, stride_t, stride_n,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr,
):  # fmt: skip
    """A frame in one block of patches. A program computes up to QB questions of a clip and HG heads."""
    groups: tl.constexpr = (H + HG - 1) // HG
    R: tl.constexpr = HG * QB
    group = tl.program_id(0) % groups
    t = tl.program_id(1)
    if WIDE:
        t = t.to(tl.int64)
    clip, first, count, row = parts.tile_of(tiles, tl.program_id(0) // groups)
    if count == 0:
        return

    n, offsets = parts.patches(0, stride_n, BN, WIDE)
    frame = tokens + row * stride_c + t.to(tl.int64) * stride_t
    b, _b_head, b_live = parts.columns(order, first, count, 0, H, QB, QB, WIDE)
    question, head, live = parts.columns(order, first, count, group, H, QB, R, WIDE)

    # First read of the frame: scores [BN, QB] and logits [BN, R].
    s = tl.zeros((BN, QB), tl.float32)
    a = tl.zeros((BN, R), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(frame + (offsets[:, None] + d[None, :]), mask=(n < N)[:, None], other=0)
        x = parts.decode(x, ARITHMETIC, FLOAT8)
        s = parts.add_scores(s, x, selector, b, b_live, d, D, ARITHMETIC, PARTS, PRECISION)
        q = parts.queries(queries, selector, question, head, live, d, D, H)
        a = tl.dot(x, q.to(ARITHMETIC), a, input_precision=PRECISION)

    shift = parts.by_patch(bias, (clip * frames + t) * N, n, N, float("-inf"))
    if HAS_SCALE:
        factor = parts.by_patch(scale, (row * frames + t) * N, n, N, 0.0)
        s *= factor[:, None]
        a *= factor[:, None]
    ranks, needed = parts.rank(s + shift[:, None], n, k, N)
    keep = parts.keep(ranks, needed)
    if group == 0:
        parts.store_selection(kept, mask, keep, 0, n, b * frames + t, b_live, k, N, BN, QB)

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
        x = tl.load(frame + (offsets[None, :] + d[:, None]), mask=(n < N)[None, :], other=0)
        o = tl.dot(parts.decode(x, ARITHMETIC, FLOAT8), weights, input_precision=PRECISION) * largest
        tl.store(pooled + ((out * D)[None, :] + d[:, None]), o.to(pooled.dtype.element_ty), mask=live[None, :])


@triton.jit
def _select(
    frame, scale, selector, bias, order, kept, mask, first, count, bias_row, scale_row, t, k, frames, stride_n,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, COUNT_BN: tl.constexpr, QB: tl.constexpr,
):  # fmt: skip
    """Score all patches of a frame at once and write which are kept."""
    n, offsets = parts.patches(0, stride_n, BN, WIDE)
    question, _head, live = parts.columns(order, first, count, 0, H, QB, QB, WIDE)
    s = tl.zeros((BN, QB), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(frame + (offsets[:, None] + d[None, :]), mask=(n < N)[:, None], other=0)
        x = parts.decode(x, ARITHMETIC, FLOAT8)
        s = parts.add_scores(s, x, selector, question, live, d, D, ARITHMETIC, PARTS, PRECISION)
    if HAS_SCALE:
        s *= parts.by_patch(scale, scale_row, n, N, 0.0)[:, None]
    s += parts.by_patch(bias, bias_row, n, N, float("-inf"))[:, None]
    ranks, needed = parts.rank(s, n, k, N)
    out = question * frames + t
    pointers = mask + (out * N)[None, :]
    tl.store(pointers + n[:, None], ranks.to(tl.int8), mask=(n < N)[:, None] & live[None, :])
    tl.debug_barrier()  # the code below reads ranks that other threads wrote

    # Ties and places are counted block by block: over the whole frame the counts need too many registers.
    before = tl.zeros((QB,), tl.int32)
    for start in range(0, N, COUNT_BN):
        m = start + tl.arange(0, COUNT_BN)
        ranks_block = tl.load(pointers + m[:, None], mask=(m < N)[:, None] & live[None, :], other=0).to(tl.int32)
        keep = parts.keep(ranks_block, needed)
        tl.debug_barrier()  # every thread has read the ranks before the mask overwrites them
        parts.store_selection(kept, mask, keep, before[None, :], m, out, live, k, N, COUNT_BN, QB)
        before += tl.sum(keep, axis=0)
        needed -= tl.sum((ranks_block == 1).to(tl.int32), axis=0)
    tl.debug_barrier()  # the code below reads a mask that other threads wrote


@triton.jit(do_not_specialize=["k", "frames"])
def forward_blocks_kernel(
    tokens, scale, queries, selector, bias, order, tiles, pooled, lse, kept, mask,
    k, frames, stride_c, stride_t, stride_n,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr,
    SELECT_BN: tl.constexpr, SELECT_BD: tl.constexpr,
):  # fmt: skip
    """A frame in several blocks of patches. A program computes up to QB questions of a clip and all heads.

    The scores of the whole frame fit in registers, the logits do not: the program selects first, then processes the
    blocks with a running maximum and sum, and pooled (float32) in memory is always the result of the blocks so far.
    """
    R: tl.constexpr = HG * QB
    t = tl.program_id(1)
    if WIDE:
        t = t.to(tl.int64)
    clip, first, count, row = parts.tile_of(tiles, tl.program_id(0))
    if count == 0:
        return
    frame = tokens + row * stride_c + t.to(tl.int64) * stride_t
    bias_row = (clip * frames + t) * N
    scale_row = (row * frames + t) * N

    _select(
        frame, scale, selector, bias, order, kept, mask, first, count, bias_row, scale_row, t, k, frames, stride_n,
        N, D, H, HAS_SCALE, WIDE, FLOAT8, ARITHMETIC, PARTS, PRECISION, SELECT_BN, SELECT_BD, BN, QB,
    )  # fmt: skip
    for group in range((H + HG - 1) // HG):
        question, head, live = parts.columns(order, first, count, group, H, QB, R, WIDE)
        out = (question * frames + t) * H + head
        top = tl.full((R,), float("-inf"), tl.float32)
        total = tl.zeros((R,), tl.float32)
        for start in range(0, N, BN):
            n, offsets = parts.patches(start, stride_n, BN, WIDE)
            a = tl.zeros((BN, R), tl.float32)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                x = tl.load(frame + (offsets[:, None] + d[None, :]), mask=(n < N)[:, None], other=0)
                q = parts.queries(queries, selector, question, head, live, d, D, H)
                a = tl.dot(parts.decode(x, ARITHMETIC, FLOAT8), q.to(ARITHMETIC), a, input_precision=PRECISION)
            if HAS_SCALE:
                factor = parts.by_patch(scale, scale_row, n, N, 0.0)
                a *= factor[:, None]
            chosen = parts.chosen(mask, question, frames, t, n, live, N)
            a = tl.where(chosen, a + parts.by_patch(bias, bias_row, n, N, float("-inf"))[:, None], float("-inf"))

            # Weights of this block, and the reduced weight of the earlier blocks.
            higher = tl.maximum(top, tl.max(a, axis=0))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(a - finite[None, :])
            earlier = total * tl.exp(top - finite)
            total = earlier + tl.sum(p, axis=0)
            top = higher
            share = 1.0 / tl.where(total == 0.0, 1.0, total)
            p *= share[None, :]
            earlier *= share
            largest = 1.0
            if HAS_SCALE:
                largest = tl.max(tl.abs(factor), axis=0)
                largest = tl.where(largest == 0.0, 1.0, largest)
                p *= (factor / largest)[:, None]
            weights = p.to(ARITHMETIC)

            written = live & (tl.zeros((R,), tl.int32) + start > 0)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                x = tl.load(frame + (offsets[None, :] + d[:, None]), mask=(n < N)[None, :], other=0)
                pointers = pooled + ((out * D)[None, :] + d[:, None])
                o = tl.dot(parts.decode(x, ARITHMETIC, FLOAT8), weights, input_precision=PRECISION) * largest
                o += tl.load(pointers, mask=written[None, :], other=0.0) * earlier[None, :]
                tl.store(pointers, o, mask=live[None, :])
            tl.debug_barrier()  # the next block loads values that other threads stored here
        empty = total == 0.0
        tl.store(lse + out, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))), mask=live)
