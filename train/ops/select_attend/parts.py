"""Functions that the forward and backward kernels of `select_attend` share.

Legend in `kernels.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def tile_of(tiles, tile):
    """A tile's clip, first place in the order, number of questions and row of the tokens, as `schedule` gives them."""
    clip = tl.load(tiles + tile * 4).to(tl.int64)
    first = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    row = tl.load(tiles + tile * 4 + 3).to(tl.int64)
    return clip, first, count, row


@triton.jit
def columns(order, first, count, group, H: tl.constexpr, QB: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    """Question and head of each of the R columns of a head group, and whether the column is used."""
    column = tl.arange(0, R)
    slot = column % QB
    head = group * (R // QB) + column // QB
    live = (slot < count) & (head < H)
    question = tl.load(order + first + slot, mask=slot < count, other=0)
    if WIDE:
        question = question.to(tl.int64)
    return question, head, live


@triton.jit
def patches(start, stride_n, BN: tl.constexpr, WIDE: tl.constexpr):
    """Patch numbers [BN] from `start` on, and their offsets in a frame."""
    n = start + tl.arange(0, BN)
    wide = n
    if WIDE:
        wide = n.to(tl.int64)
    return n, wide * stride_n


@triton.jit
def add_scores(s, x, selector, b, b_live, d, D: tl.constexpr, ARITHMETIC: tl.constexpr, PARTS: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """s [BN, QB] and the product of tokens x [BN, BD] with these channels of the selector, in parts."""
    left = tl.load(selector + ((b * D)[None, :] + d[:, None]), mask=b_live[None, :], other=0.0).to(tl.float32)
    for _ in tl.static_range(PARTS):
        part = left.to(ARITHMETIC)
        s = tl.dot(x, part, s, input_precision=PRECISION)
        left -= part.to(tl.float32)
    return s


@triton.jit
def decode(x, ARITHMETIC: tl.constexpr, FLOAT8: tl.constexpr):
    """Tokens in the arithmetic's dtype. float8_e4m3 is passed as its bits, which not every GPU can convert.

    Its seven bits of exponent and fraction, shifted to their place in float16, are the value over 2^8, also for
    subnormals.
    """
    if FLOAT8:
        bits = x.to(tl.int16)
        value = (((bits & 0x7F) << 7) | (bits & -32768)).to(tl.float16, bitcast=True) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
    return x.to(ARITHMETIC)


@triton.jit
def queries(queries, selector, question, head, live, d, D: tl.constexpr, H: tl.constexpr):
    """queries + selector [BD, R] float32; the product of their sum with a token is the logit without its bias."""
    q = tl.load(queries + (((question * H + head) * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
    s = tl.load(selector + ((question * D)[None, :] + d[:, None]), mask=live[None, :], other=0.0)
    return q.to(tl.float32) + s.to(tl.float32)


@triton.jit
def rank(scores, n, k, N: tl.constexpr):
    """Compare scores [BN, QB] with the k-th largest of their column: 2 above it, 1 equal, 0 below; and the number of
    equal ones that are among the k [QB].

    Floats are mapped to integers of the same order, and the k-th largest is found bit by bit from the highest.
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
    above = (key > threshold[None, :]).to(tl.int32)
    return above + (key >= threshold[None, :]).to(tl.int32), k - tl.sum(above, axis=0)


@triton.jit
def keep(ranks, needed):
    """Kept patches of ranks [BN, QB], int32: those above the threshold, and the first `needed` of those at it."""
    first = tl.cumsum((ranks == 1).to(tl.int32), axis=0) <= needed[None, :]
    return ((ranks == 2) | ((ranks == 1) & first)).to(tl.int32)


@triton.jit
def store_selection(kept, mask, keep, before, n, out, live, k, N: tl.constexpr, BN: tl.constexpr, QB: tl.constexpr):
    """Write keep [BN, QB] as indices in rising order, after the `before` indices of earlier blocks, and as the mask."""
    place = before + tl.cumsum(keep, axis=0) - 1
    chosen = (keep > 0) & live[None, :]
    tl.store(kept + ((out * k)[None, :] + place), tl.broadcast_to(n.to(tl.int64)[:, None], (BN, QB)), mask=chosen)
    tl.store(mask + ((out * N)[None, :] + n[:, None]), keep.to(tl.int8), mask=(n < N)[:, None] & live[None, :])


@triton.jit
def by_patch(values, row, n, N: tl.constexpr, other):
    """Bias or scale of the patches n of a frame, float32; `other` beyond the frame."""
    return tl.load(values + row + n, mask=n < N, other=other).to(tl.float32)


@triton.jit
def chosen(mask, question, frames, t, n, live, N: tl.constexpr):
    """Whether the question of each column keeps each of the patches n [BN]: [BN, R]."""
    pointers = mask + (((question * frames + t) * N)[None, :] + n[:, None])
    return tl.load(pointers, mask=(n < N)[:, None] & live[None, :], other=0) > 0
