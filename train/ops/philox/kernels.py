"""Philox4x64-10 on a GPU: dropout and uniform numbers, one launch each. `reference` defines the numbers.

Shape legend: M stacked heads, R rows of a tensor, E entries a row. The dimension M is left out for a single head.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from egopatch.train.ops.philox.reference import (
    DROPOUT_BLOCK,
    UNIFORM_BITS,
    UNIFORM_BLOCK,
    Draw,
    dropout_scale,
    threshold,
)
from egopatch.train.ops.stacked import on_device

# Blocks of 256 bits that a program draws.
BLOCKS = 128
WARPS = 4


def dropout(x: Tensor, draw: Draw, p: float) -> Tensor:
    """`x` [M, R, ...] with dropped entries set to zero and the others scaled up, in one launch."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(dropout_kernel, x, out, draw, DROPOUT_BLOCK, threshold=threshold(p), scale=dropout_scale(p))
    return out


def uniform(shape: tuple[int, ...], draw: Draw, device: torch.device) -> Tensor:
    """float32 [M, *shape] in [0, 1), in one launch."""
    stacked = (len(draw.seeds),) if len(draw.seeds) > 1 else ()
    out = torch.empty(*stacked, *shape, device=device)
    _launch(uniform_kernel, None, out, draw, UNIFORM_BLOCK, shift=32 - UNIFORM_BITS, unit=2.0**-UNIFORM_BITS)
    return out


def _launch(kernel: triton.JITFunction, x: Tensor | None, out: Tensor, draw: Draw, block: int, **values: float) -> None:
    if not out.numel():
        return
    stacked = len(draw.seeds)
    rows = out.shape[1 if stacked > 1 else 0]
    entries = out.numel() // (stacked * rows)
    blocks = triton.cdiv(entries, block)
    grid = (triton.cdiv(rows * blocks, BLOCKS), stacked)
    inputs = () if x is None else (x,)
    arguments = (on_device(draw.seeds, torch.int64, out.device), draw.rows, draw.place, draw.position, rows, entries)
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its arguments are on
        kernel[grid](*inputs, out, *arguments, **values, BLOCK=block, BLOCKS=BLOCKS, num_warps=WARPS)


# Triton would compile the kernels again for the numbers that change with the module or the batch, if it specialised on
# them. `entries` is a width of the head, and specialised: rows of whole blocks are read many bytes at a time.
CHANGING = ["place", "rows"]


@triton.jit(do_not_specialize=CHANGING)
def dropout_kernel(
    x, out, seeds, wanted, place, position, rows, entries, threshold, scale,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`x` with dropped entries zero and the others times `scale`: [M, R, E] for this program's blocks."""
    row, block = _place_of_blocks(rows, entries, BLOCK, BLOCKS)
    words = _words(seeds, wanted, place, position, row, block, rows, tl.cdiv(entries, BLOCK))
    number = tl.arange(0, BLOCK)[None, :]
    keep = _numbers(words, number, BLOCK) >= threshold
    at, inside = _addresses(row, block, number, rows, entries, BLOCK)
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, tl.where(keep, value * scale, 0), mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def uniform_kernel(
    out, seeds, wanted, place, position, rows, entries, shift, unit,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Multiples of `unit` in [0, 1): [M, R, E] for this program's blocks."""
    row, block = _place_of_blocks(rows, entries, BLOCK, BLOCKS)
    words = _words(seeds, wanted, place, position, row, block, rows, tl.cdiv(entries, BLOCK))
    number = tl.arange(0, BLOCK)[None, :]
    drawn = _numbers(words, number, BLOCK) >> shift
    at, inside = _addresses(row, block, number, rows, entries, BLOCK)
    tl.store(out + at, drawn.to(tl.float32) * unit, mask=inside)


@triton.jit
def _place_of_blocks(rows, entries, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The row of each of this program's blocks, and the block's number in it, [BLOCKS] each."""
    blocks = tl.cdiv(entries, BLOCK)
    index = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    return index // blocks, index % blocks


@triton.jit
def _words(seeds, wanted, place, position, row, block, rows, blocks):
    """The four 64-bit words of each block, [BLOCKS] each."""
    if wanted is not None:
        row = tl.load(wanted + row, mask=row < rows, other=0)
    counter = (1 + row * blocks + block).to(tl.uint64)
    zero = counter * 0
    seed = tl.load(seeds + tl.program_id(1)).to(tl.uint64)
    return tl.philox_impl(
        counter,
        zero + tl.load(position).to(tl.uint64),
        zero + tl.load(position + 1).to(tl.uint64),
        zero,
        zero + seed,
        zero + place.to(tl.uint64),
    )


@triton.jit
def _numbers(words, number, BLOCK: tl.constexpr):
    """[BLOCKS, BLOCK] unsigned numbers of 256 / BLOCK bits, in int64."""
    A_WORD: tl.constexpr = BLOCK // 4
    word = number // A_WORD
    a, b, c, d = words
    chosen = tl.where(word < 2, tl.where(word < 1, a[:, None], b[:, None]), tl.where(word < 3, c[:, None], d[:, None]))
    shift = ((number % A_WORD) * (64 // A_WORD)).to(tl.uint64)
    return ((chosen >> shift) & (2 ** (64 // A_WORD) - 1)).to(tl.int64)


@triton.jit
def _addresses(row, block, number, rows, entries, BLOCK: tl.constexpr):
    """Offset of each number's entry, and whether that entry exists, [BLOCKS, BLOCK] each."""
    entry = block[:, None] * BLOCK + number
    at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * entries + entry
    return at, (row[:, None] < rows) & (entry < entries)
