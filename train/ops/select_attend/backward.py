"""Backward kernels of `select_attend`: gradients of the logits, and from them those of queries, selector and bias.

Legend in `kernels.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from egopatch.train.ops.select_attend import parts


@triton.jit
def _weigh(
    tokens, columns, column_scale, grad_pooled, grad_top, out, asked, live, lse, mask, scale_row, bias_row, scale, bias,
    tile, group, row, t, start,
    N: tl.constexpr, PITCH: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax weights of a block of patches and products with the pooled gradient, both [BN, R]."""
    n = start + tl.arange(0, BN)
    a = tl.zeros((BN, HG * QB), tl.float32)
    products = tl.zeros((BN, HG * QB), tl.float32)
    pointers = grad_pooled + (out * D)[:, None] + tl.arange(0, BD)[None, :]
    unit = (1.0 / grad_top)[:, None]
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
        x = parts.patch_block(tokens, row, t, start, d0, BN, BD, FLOAT8, ARITHMETIC)
        a = parts.add_logits(a, x, columns, tile, group, d0, H, QB, HG, PRECISION)
        g = tl.load(pointers + d0, mask=live[:, None], other=0.0)
        g = (g.to(tl.float32) * unit).to(ARITHMETIC)
        products = tl.dot(x, g.T, products, input_precision=PRECISION)
    a *= parts.by_column(column_scale, tile, group, H, QB, HG)[None, :]
    products *= grad_top[None, :]
    if HAS_SCALE:
        factor = parts.by_patch(scale, scale_row, n, N, 0.0)
        a *= factor[:, None]
        products *= factor[:, None]
    shift = parts.by_patch(bias, bias_row, n, N, float("-inf"))
    log_total = tl.load(lse + out, mask=live, other=0.0)
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
    kept = parts.chosen(mask, asked, n, live, PITCH)
    return tl.where(kept, tl.exp(a + shift[:, None] - log_total[None, :]), 0.0), products


@triton.jit(do_not_specialize=["frames", "each", "first_tile"])
def logits_kernel(
    tokens, columns, column_scale, grad_pooled, grad_tops, grad_lse, scale, bias, order, tiles, lse, mask,
    weights, tops, grad_bias, frames, each, first_tile,
    N: tl.constexpr, PITCH: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HAS_SCALE: tl.constexpr,
    FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    QB: tl.constexpr, HG: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of a frame, for up to QB questions of a clip and HG heads.

    Writes them as factors of the tokens to weights [tiles, T, groups, R, PADDED], each block of a column divided by its
    largest value, or by SMALLEST if that is larger, which goes to tops [tiles, T, groups, blocks, R]; and their sum
    over the columns to grad_bias [G, groups, T, N].
    """
    groups: tl.constexpr = (H + HG - 1) // HG
    R: tl.constexpr = HG * QB
    blocks: tl.constexpr = (N + BN - 1) // BN
    passes: tl.constexpr = 1 if blocks == 1 else 2
    t = tl.program_id(0) % frames
    group = (tl.program_id(0) // frames) % groups
    local = tl.program_id(0) // (frames * groups)
    tile = first_tile + local
    clip, first, count, row = parts.tile_of(tiles, tile)
    if count == 0:
        return
    out, asked, live = parts.outputs(order, first, count, group, t, frames, each, H, QB, HG)
    scale_row = (row.to(tl.int64) * frames + t) * N
    bias_row = (clip * frames + t) * N

    grad_top = tl.load(grad_tops + out, mask=live, other=1.0)
    direct = tl.load(grad_lse + out, mask=live, other=0.0).to(tl.float32)

    # Several blocks take two passes, the first for the mean of the (rounded) products over all of them.
    # <grad_pooled, pooled> equals that mean too, but would not cancel the rounding of the products, nor would lse
    # cancel that of the weights.
    mean = tl.zeros((R,), tl.float32)
    total = tl.zeros((R,), tl.float32)
    frame = (local.to(tl.int64) * frames + t) * groups + group
    column = tl.arange(0, R)
    for step in range(0, blocks * passes):
        block = step % blocks
        start = block * BN
        n = start + tl.arange(0, BN)
        p, products = _weigh(
            tokens, columns, column_scale, grad_pooled, grad_top, out, asked, live, lse, mask, scale_row, bias_row,
            scale, bias, tile, group, row, t, start,
            N, PITCH, D, H, HAS_SCALE, FLOAT8, ARITHMETIC, PRECISION, BN, BD, QB, HG, STAGES,
        )  # fmt: skip
        if passes == 1:
            total = tl.sum(p, axis=0)
            p *= (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]
            products -= tl.sum(p * products, axis=0)[None, :]
        elif step < blocks:
            total += tl.sum(p, axis=0)
            mean += tl.sum(p * products, axis=0)
        if passes == 1 or step >= blocks:
            if passes > 1:
                share = 1.0 / tl.where(total == 0.0, 1.0, total)
                p *= share[None, :]
                products -= (mean * share)[None, :]
            # Where p is 0 the gradient is 0, even if an infinite lse made grad_lse infinite or NaN.
            grad = tl.where(p > 0.0, p * (products + direct[None, :]), 0.0)
            partial = ((tile.to(tl.int64) * groups + group) * frames + t) * N
            tl.store(grad_bias + partial + n, tl.sum(grad, axis=1), mask=n < N)
            if HAS_SCALE:
                grad *= parts.by_patch(scale, scale_row, n, N, 0.0)[:, None]
            top = tl.maximum(tl.max(tl.abs(grad), axis=0), SMALLEST)
            tl.store(tops + (frame * blocks + block) * R + column, top)
            rounded = (grad * (1.0 / top)[None, :]).to(ARITHMETIC)
            pointers = weights + ((frame * R + column) * PADDED)[None, :] + n[:, None]
            tl.store(pointers, rounded, mask=(n < PADDED)[:, None])


@triton.jit(do_not_specialize=["frames", "first_tile"])
def queries_kernel(
    tokens, weights, tops, order, tiles, grad_queries, frames, first_tile,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, FLOAT8: tl.constexpr, ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BD channels of the query gradients of ROWS columns of a tile: the output of `logits_kernel` times the tokens.

    One product over the patches of all frames, in order, so that repeated calls give equal bits.
    """
    groups: tl.constexpr = (H + HG - 1) // HG
    R: tl.constexpr = HG * QB
    blocks: tl.constexpr = (N + BN - 1) // BN
    chunks: tl.constexpr = (D + BD - 1) // BD
    spans: tl.constexpr = groups * R // ROWS
    steps: tl.constexpr = (N + BK - 1) // BK
    d0 = (tl.program_id(0) % chunks) * BD
    span = (tl.program_id(0) // chunks) % spans
    local = tl.program_id(0) // (chunks * spans)
    _clip, first, count, row = parts.tile_of(tiles, first_tile + local)
    if count == 0:
        return
    column = span * ROWS + tl.arange(0, ROWS)
    group = column // R
    total = tl.zeros((ROWS, BD), tl.float32)
    for step in tl.range(0, frames * steps, num_stages=STAGES):
        t = step // steps
        start = (step % steps) * BK
        x = parts.patch_block(tokens, row, t, start, d0, BK, BD, FLOAT8, ARITHMETIC)
        frame = local * frames + t
        w = weights.load([frame * (groups * R) + span * ROWS, start])
        at = ((frame.to(tl.int64) * groups + group) * blocks + start // BN) * R + column % R
        total += tl.dot(w, x, input_precision=PRECISION) * tl.load(tops + at)[:, None]
    slot = column % QB
    head = column // QB
    live = (slot < count) & (head < H)
    question = tl.load(order + first + slot, mask=slot < count, other=0).to(tl.int64)
    d = d0 + tl.arange(0, BD)
    pointers = grad_queries + ((question * H + head) * D)[:, None] + d[None, :]
    tl.store(pointers, total, mask=live[:, None] & (d < D)[None, :])


@triton.jit
def bias_kernel(partials, clip_tiles, grad_bias, frames, N: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr):
    """Sum the partial bias gradients of a clip's programs in a fixed order."""
    clip = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    first = tl.load(clip_tiles + clip * 2).to(tl.int64) * GROUPS
    last = tl.load(clip_tiles + clip * 2 + 1).to(tl.int64) * GROUPS
    for i in range(0, last - first):
        total += tl.load(partials + ((first + i) * frames + t) * N + n, mask=n < N, other=0.0)
    tl.store(grad_bias + (clip.to(tl.int64) * frames + t) * N + n, total, mask=n < N)
