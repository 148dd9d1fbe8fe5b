"""Forward kernels of `select_attend`: one for frames of one block, one for frames of several blocks.

Legend in `kernels.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from egopatch.train.ops.select_attend import parts


@triton.jit(do_not_specialize=["frames", "questions", "each"])
def forward_kernel(
    tokens, tokens_again, columns, selectors, column_scale, selector_scale, scale, bias, order, tiles,
    pooled, lse, scores, cuts, ks, frames, questions, each,
    N: tl.constexpr, PITCH: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    POOL_BD: tl.constexpr, POOL_STAGES: tl.constexpr,
):  # fmt: skip
    """A frame in one block of patches. A program computes up to QB questions of a clip and HG heads."""
    groups: tl.constexpr = (H + HG - 1) // HG
    R: tl.constexpr = HG * QB
    # Frames first, so that the tiles of a clip, which read the same frames, run at about the same time.
    t = tl.program_id(0) % frames
    group = (tl.program_id(0) // frames) % groups
    tile = tl.program_id(0) // (frames * groups)
    clip, first, count, row = parts.tile_of(tiles, tile)
    if count == 0:
        return

    # First read of the frame: scores [BN, QB] and logits [BN, R].
    n = tl.arange(0, BN)
    s = tl.zeros((BN, QB), tl.float32)
    a = tl.zeros((BN, R), tl.float32)
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
        x = parts.patch_block(tokens, row, t, 0, d0, BN, BD, FLOAT8, ARITHMETIC)
        a = parts.add_logits(a, x, columns, tile, group, d0, H, QB, HG, PRECISION)
        s = parts.add_scores(s, x, selectors, tile, d0, PARTS, QB, BD, PRECISION)

    shift = parts.by_patch(bias, (clip * frames + t) * N, n, N, float("-inf"))
    slot = tl.arange(0, QB)
    s *= tl.load(selector_scale + tile * QB + slot)[None, :]
    if HAS_SCALE:
        factor = parts.by_patch(scale, (row.to(tl.int64) * frames + t) * N, n, N, 0.0)
        s *= factor[:, None]
    s += shift[:, None]
    asked = slot < count
    question = tl.load(order + first + slot, mask=asked, other=0).to(tl.int64)
    row_of = question * frames + t
    # Every group selects for itself, in memory of its own; all of them select the same patches.
    score_rows = group.to(tl.int64) * questions * frames + row_of
    tl.store(scores + (score_rows * PITCH)[None, :] + n[:, None], s, mask=(n < PITCH)[:, None] & asked[None, :])
    tl.debug_barrier()  # the code below reads scores that other threads wrote
    k = tl.load(ks + clip)
    threshold, last = parts.cut(scores, score_rows, asked, k, N, PITCH, CHUNK, QB)
    told = slot < tl.where(group == 0, count, 0)
    tl.store(cuts + row_of * 2, threshold, mask=told)
    tl.store(cuts + row_of * 2 + 1, last, mask=told)
    keep = parts.of_heads(parts.kept_by_cut(s, n, threshold, last, N), BN, QB, HG)

    a *= parts.by_column(column_scale, tile, group, H, QB, HG)[None, :]
    if HAS_SCALE:
        a *= factor[:, None]
    a = tl.where(keep, a + shift[:, None], float("-inf"))
    top = tl.max(a, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp(a - top[None, :])
    total = tl.sum(p, axis=0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out, _asked, live = parts.outputs(order, first, count, group, t, frames, each, H, QB, HG)
    tl.store(lse + out, tl.where(empty, float("-inf"), top + tl.log(total)), mask=live)
    p *= (1.0 / total)[None, :]
    largest = 1.0
    if HAS_SCALE:
        largest = tl.max(tl.abs(factor), axis=0)
        largest = tl.where(largest == 0.0, 1.0, largest)
        p *= (factor / largest)[:, None]
    weights = p.to(ARITHMETIC)

    # Second read: pooled [POOL_BD, R]. The tokens come first in both products, as rows for Hopper's `wgmma`.
    for d0 in tl.range(0, D, POOL_BD, num_stages=POOL_STAGES):
        x = parts.patch_block(tokens_again, row, t, 0, d0, BN, POOL_BD, FLOAT8, ARITHMETIC)
        o = tl.dot(x.T, weights, input_precision=PRECISION) * largest
        d = d0 + tl.arange(0, POOL_BD)
        tl.store(pooled + (out * D)[None, :] + d[:, None], o.to(pooled.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=["frames", "questions", "each"])
def forward_blocks_kernel(
    tokens, tokens_again, columns, selectors, column_scale, selector_scale, scale, bias, order, tiles,
    pooled, lse, scores, cuts, ks, frames, questions, each,
    N: tl.constexpr, PITCH: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    POOL_BD: tl.constexpr, POOL_STAGES: tl.constexpr,
):  # fmt: skip
    """A frame in several blocks of patches. A program computes up to QB questions of a clip and all heads.

    The program scores the whole frame and selects, and then processes the blocks with a running maximum and sum;
    pooled (float32) in memory is always the result of the blocks so far.
    """
    t = tl.program_id(0) % frames
    tile = tl.program_id(0) // frames
    clip, first, count, row = parts.tile_of(tiles, tile)
    if count == 0:
        return
    bias_row = (clip * frames + t) * N
    scale_row = (row.to(tl.int64) * frames + t) * N
    slot = tl.arange(0, QB)
    asked = slot < count
    question = tl.load(order + first + slot, mask=asked, other=0).to(tl.int64)
    row_of = question * frames + t

    factor = tl.load(selector_scale + tile * QB + slot)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        s = tl.zeros((BN, QB), tl.float32)
        for d0 in tl.range(0, D, BD, num_stages=STAGES):
            x = parts.patch_block(tokens, row, t, start, d0, BN, BD, FLOAT8, ARITHMETIC)
            s = parts.add_scores(s, x, selectors, tile, d0, PARTS, QB, BD, PRECISION)
        s *= factor[None, :]
        if HAS_SCALE:
            s *= parts.by_patch(scale, scale_row, n, N, 0.0)[:, None]
        s += parts.by_patch(bias, bias_row, n, N, float("-inf"))[:, None]
        tl.store(scores + (row_of * PITCH)[None, :] + n[:, None], s, mask=(n < PITCH)[:, None] & asked[None, :])
    tl.debug_barrier()  # the code below reads scores that other threads wrote
    k = tl.load(ks + clip)
    threshold, last = parts.cut(scores, row_of, asked, k, N, PITCH, CHUNK, QB)
    tl.store(cuts + row_of * 2, threshold, mask=asked)
    tl.store(cuts + row_of * 2 + 1, last, mask=asked)

    R: tl.constexpr = HG * QB
    for group in range((H + HG - 1) // HG):
        out, _asked, live = parts.outputs(order, first, count, group, t, frames, each, H, QB, HG)
        column = parts.by_column(column_scale, tile, group, H, QB, HG)
        top = tl.full((R,), float("-inf"), tl.float32)
        total = tl.zeros((R,), tl.float32)
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN)
            a = tl.zeros((BN, R), tl.float32)
            for d0 in tl.range(0, D, BD, num_stages=STAGES):
                x = parts.patch_block(tokens, row, t, start, d0, BN, BD, FLOAT8, ARITHMETIC)
                a = parts.add_logits(a, x, columns, tile, group, d0, H, QB, HG, PRECISION)
            a *= column[None, :]
            if HAS_SCALE:
                by_patch = parts.by_patch(scale, scale_row, n, N, 0.0)
                a *= by_patch[:, None]
            shift = parts.by_patch(bias, bias_row, n, N, float("-inf"))
            inside = (n < PITCH)[:, None] & asked[None, :]
            s = tl.load(scores + (row_of * PITCH)[None, :] + n[:, None], mask=inside, other=0.0)
            keep = parts.of_heads(parts.kept_by_cut(s, n, threshold, last, N), BN, QB, HG)
            a = tl.where(keep, a + shift[:, None], float("-inf"))

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
                largest = tl.max(tl.abs(by_patch), axis=0)
                largest = tl.where(largest == 0.0, 1.0, largest)
                p *= (by_patch / largest)[:, None]
            weights = p.to(ARITHMETIC)

            written = live & (tl.zeros((R,), tl.int32) + start > 0)
            for d0 in tl.range(0, D, POOL_BD, num_stages=POOL_STAGES):
                x = parts.patch_block(tokens_again, row, t, start, d0, BN, POOL_BD, FLOAT8, ARITHMETIC)
                o = tl.dot(x.T, weights, input_precision=PRECISION) * largest
                pointers = pooled + (out * D)[None, :] + (d0 + tl.arange(0, POOL_BD))[:, None]
                o += tl.load(pointers, mask=written[None, :], other=0.0) * earlier[None, :]
                tl.store(pointers, o, mask=live[None, :])
            tl.debug_barrier()  # the next block loads values that other threads stored here
        empty = total == 0.0
        tl.store(lse + out, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))), mask=live)


@triton.jit(do_not_specialize=["listed", "rows"])
def kept_kernel(
    scores, cuts, kept, mask, listed, rows,
    N: tl.constexpr, PITCH: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The patches that the cuts keep in ROWS frames of questions: the first ones in rising order, and the mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BN)
    live = row < rows
    stored = live[:, None] & (n < PITCH)[None, :]
    inside = live[:, None] & (n < N)[None, :]
    ordered = parts.key(tl.load(scores + (row * PITCH)[:, None] + n[None, :], mask=stored, other=0.0), inside)
    threshold = tl.load(cuts + row * 2, mask=live, other=0)[:, None]
    last = tl.load(cuts + row * 2 + 1, mask=live, other=0)[:, None]
    keep = inside & ((ordered > threshold) | ((ordered == threshold) & (n[None, :] <= last)))
    place = tl.cumsum(keep.to(tl.int32), axis=1) - 1
    patches = tl.broadcast_to(n.to(tl.int64)[None, :], (ROWS, BN))
    tl.store(kept + (row * listed)[:, None] + place, patches, mask=keep & (place < listed))
    tl.store(mask + (row * PITCH)[:, None] + n[None, :], keep.to(tl.int8), mask=stored)
