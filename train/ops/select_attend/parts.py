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
    row = tl.load(tiles + tile * 4 + 3)
    return clip, first, count, row


@triton.jit
def outputs(order, first, count, group, t, frames, each, H: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr):
    """Each column's row in outputs [M, H, B / M, T] and in [B, T], for a head group, and whether it is used.

    `each` is B / M, the questions of a stacked head. 64 bits: outputs may have more than 2^31 elements.
    """
    column = tl.arange(0, HG * QB)
    slot = column % QB
    head = group * HG + column // QB
    question = tl.load(order + first + slot, mask=slot < count, other=0)
    row = (question // each * H + head) * each + question % each
    return row.to(tl.int64) * frames + t, question.to(tl.int64) * frames + t, (slot < count) & (head < H)


@triton.jit
def patch_block(tokens, row, t, start, d0, BN: tl.constexpr, BD: tl.constexpr, FLOAT8: tl.constexpr,
                ARITHMETIC: tl.constexpr):  # fmt: skip
    """BN patches of a frame, BD of their channels, in the arithmetic's dtype; zeros beyond the frame."""
    x = tl.reshape(tokens.load([row, t, start, d0]), (BN, BD))
    return decode(x, ARITHMETIC, FLOAT8)


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
def add_scores(s, x, selectors, tile, d0, PARTS: tl.constexpr, QB: tl.constexpr, BD: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """s [BN, QB] plus the product of tokens x [BN, BD] with these channels of the selectors' parts."""
    for i in tl.static_range(PARTS):
        part = selectors.load([(tile * PARTS + i) * QB, d0])
        s = tl.dot(x, part.T, s, input_precision=PRECISION)
    return s


@triton.jit
def add_logits(a, x, columns, tile, group, d0, H: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """a [BN, HG * QB] plus the product of tokens x [BN, BD] with these channels of a head group's columns."""
    q = columns.load([(tile * H + group * HG) * QB, d0])
    return tl.dot(x, q.T, a, input_precision=PRECISION)


@triton.jit
def by_column(scales, tile, group, H: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr):
    """The factors that `columns_kernel` took out of a head group's columns; 0 for heads beyond the last."""
    column = tl.arange(0, HG * QB)
    live = group * HG + column // QB < H
    return tl.load(scales + (tile * H + group * HG) * QB + column, mask=live, other=0.0)


@triton.jit
def by_patch(values, row, n, N: tl.constexpr, other):
    """Bias or scale of the patches n of a frame, float32; `other` beyond the frame."""
    return tl.load(values + row + n, mask=n < N, other=other).to(tl.float32)


@triton.jit
def chosen(mask, asked, n, live, PITCH: tl.constexpr):
    """Whether the question of each column, whose row of the mask is `asked`, keeps the patches n [BN]: [BN, R]."""
    kept = tl.load(mask + (asked * PITCH)[None, :] + n[:, None], mask=(n < PITCH)[:, None] & live[None, :], other=0)
    return kept > 0


@triton.jit
def key(scores, inside):
    """Integers in the same order as the scores; outside the frame the lowest integer. Both zeros map to one integer."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(inside, ordered, -2147483648)


@triton.jit
def cut(scores, rows, live, k, N: tl.constexpr, PITCH: tl.constexpr, CHUNK: tl.constexpr, QB: tl.constexpr):
    """The cut of each question [QB]: the key of its k-th largest score, and the last patch kept among equal ones.

    The scores of a question are read as a row of one warp, in one or two chunks, so that counting over a row needs no
    barrier: sm_80 and newer add up a warp's integers in one instruction. Both numbers are found bit by bit, from the
    highest.
    """
    two: tl.constexpr = N > CHUNK
    m = tl.arange(0, CHUNK)
    far = m + CHUNK
    used = live[:, None]
    at = scores + (rows * PITCH)[:, None]
    a = key(tl.load(at + m[None, :], mask=used & (m < PITCH)[None, :], other=0.0), (m < N)[None, :])
    b = a
    if two:
        b = key(tl.load(at + far[None, :], mask=used & (far < PITCH)[None, :], other=0.0), (far < N)[None, :])

    reach = (a >= 0).to(tl.int32)
    if two:
        reach += (b >= 0).to(tl.int32)
    threshold = tl.where(tl.sum(reach, axis=1) >= k, 0, -2147483648)
    rounds = tl.where(k == N, 0, 31)  # all are kept: any threshold below all keys works
    for i in range(rounds):
        higher = threshold | (1 << (30 - i))
        reach = (a >= higher[:, None]).to(tl.int32)
        if two:
            reach += (b >= higher[:, None]).to(tl.int32)
        threshold = tl.where(tl.sum(reach, axis=1) >= k, higher, threshold)

    above = (a > threshold[:, None]).to(tl.int32)
    if two:
        above += (b > threshold[:, None]).to(tl.int32)
    needed = k - tl.sum(above, axis=1)
    last = tl.zeros((QB,), tl.int32)
    for i in range(10):  # N is at most 1,024
        later = last + (512 >> i)
        ties = ((a == threshold[:, None]) & (m[None, :] < later[:, None])).to(tl.int32)
        if two:
            ties += ((b == threshold[:, None]) & (far[None, :] < later[:, None])).to(tl.int32)
        last = tl.where(tl.sum(ties, axis=1) < needed, later, last)
    return threshold, last


@triton.jit
def kept_by_cut(scores, n, threshold, last, N: tl.constexpr):
    """Which patches n [BN] are kept, for scores [BN, QB]: those above the cut, and the first ones at it."""
    ordered = key(scores, (n < N)[:, None])
    tied = (ordered == threshold[None, :]) & (n[:, None] <= last[None, :]) & (n < N)[:, None]
    return (ordered > threshold[None, :]) | tied


@triton.jit
def of_heads(keep, BN: tl.constexpr, QB: tl.constexpr, HG: tl.constexpr):
    """keep [BN, QB] for each head: [BN, HG * QB]."""
    each = tl.broadcast_to(keep.to(tl.int8)[:, None, :], (BN, HG, QB))
    return tl.reshape(each, (BN, HG * QB)) > 0
