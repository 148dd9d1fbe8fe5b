"""The columns of the kernels' products: queries and selectors, converted once for all programs that read them.

Legend in `kernels.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from egopatch.train.ops.select_attend import parts


@triton.jit
def _powers(values):
    """The power of two that scales a row's largest value to [2^14, 2^15), and its inverse.

    That is just below float16's largest number, and values of 2^-28 of the row's largest still keep all of their bits.
    """
    largest = tl.max(tl.abs(values), axis=0)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.where(largest == 0.0, 14, tl.maximum(exponent, -100))  # both powers must be normal numbers
    up = ((14 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14 + 127) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def columns_kernel(
    queries, selector, order, tiles, columns, column_scale, selectors, selector_scale,
    D: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, QB: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Convert one question of a tile; writes zeros if the tile has fewer questions.

    Writes queries + selector to columns [G, H, QB, D], since a token's product with their sum is its logit without the
    bias; and the selector in PARTS parts that add up to it to selectors [G, PARTS, QB, D]; backward needs none. Both
    are scaled by a power of two, whose inverse goes to column_scale [G, H, QB] and selector_scale [G, QB].
    """
    tile = tl.program_id(0)
    slot = tl.program_id(1)
    _clip, first, count, _row = parts.tile_of(tiles, tile)
    _clip, _first, before, _row = parts.tile_of(tiles, tl.maximum(tile - 1, 0))
    # A group of heads that ends beyond the last head reads into the next tile, whose rows must then be written too.
    if (count == 0) & (before == 0):
        return
    d = tl.arange(0, WIDTH)
    question = tl.load(order + first + slot, mask=slot < count, other=0).to(tl.int64)
    used = d < tl.where(slot < count, D, 0)
    s = tl.load(selector + question * D + d, mask=used, other=0.0).to(tl.float32)
    if PARTS > 0:
        up, down = _powers(s)
        left = s * up
        for i in tl.static_range(PARTS):
            part = left.to(selectors.dtype.element_ty)
            tl.store(selectors + ((tile.to(tl.int64) * PARTS + i) * QB + slot) * D + d, part, mask=d < D)
            left -= part.to(tl.float32)
        tl.store(selector_scale + tile * QB + slot, down)
    for h in range(H):
        q = tl.load(queries + (question * H + h) * D + d, mask=used, other=0.0).to(tl.float32) + s
        up, down = _powers(q)
        row = (tile.to(tl.int64) * H + h) * QB + slot
        tl.store(columns + row * D + d, (q * up).to(columns.dtype.element_ty), mask=d < D)
        tl.store(column_scale + row, down)
