"""NumPy's Philox4x64-10: the specification of the random numbers, and the implementation for a CPU.

A counter-based generator encrypts a counter: any block of numbers is drawn without those before it, so that a part of a
tensor can be drawn alone, and in any order. Philox4x64-10 passes all tests of TestU01's BigCrush (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Shape legend: M stacked heads, K different seeds, R rows of a tensor, E numbers a row. The dimension M is left out for a
single head.

Block i of a row, for seed s, is the four 64-bit words of

    philox(counter = (1 + row * blocks a row + i, position[0], position[1], 0), key = (s, place))

taken as 16 numbers of 16 bits for dropout, or as 8 of 32 bits for uniform numbers, lowest bits first. Rows begin with a
new block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Numbers in a block of 256 bits.
DROPOUT_BLOCK, UNIFORM_BLOCK = 16, 8
# Dropout compares numbers below this with a threshold.
DROPOUT_RANGE = 2**16
# The 24 bits that float32 holds.
UNIFORM_BITS = 24
WORD = 2**64


@dataclass(frozen=True)
class Draw:
    """Which numbers to draw.

    Attributes:
        seeds: Seed of each of the M stacked heads.
        place: Number of the module that draws.
        position: [2] long on the device: numbers that tell the module's draws apart, such as the step.
            A tensor, because a CUDA graph of a step draws other numbers in each replay.
        rows: [R] long, rising: the rows of the whole tensor to draw; None for all.
    """

    seeds: tuple[int, ...] = (0,)
    place: int = 0
    position: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.long))
    rows: Tensor | None = None


def uniform(shape: tuple[int, ...], draw: Draw) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24: [M, *shape] for the shape [R, ...] of a head's tensor."""
    entries = math.prod(shape[1:])
    numbers = _bits(shape[0], entries, UNIFORM_BLOCK, draw, np.dtype("<u4")) >> (32 - UNIFORM_BITS)
    drawn = torch.from_numpy(numbers.astype(np.float32)) * 2.0**-UNIFORM_BITS
    return _of_heads(drawn.view(len(drawn), *shape), draw)


def dropout_factor(shape: tuple[int, ...], draw: Draw, p: float) -> Tensor:
    """float32 [M, *shape]: 0 where dropout drops an entry, `dropout_scale` elsewhere."""
    entries = math.prod(shape[1:])
    numbers = _bits(shape[0], entries, DROPOUT_BLOCK, draw, np.dtype("<u2"))
    factor = np.multiply(numbers >= threshold(p), np.float32(dropout_scale(p)), dtype=np.float32)
    return _of_heads(torch.from_numpy(factor).view(len(numbers), *shape), draw)


def threshold(p: float) -> int:
    """Dropout with probability `p` drops the entries whose number is below this."""
    return min(round(p * DROPOUT_RANGE), DROPOUT_RANGE - 1)


def dropout_scale(p: float) -> float:
    """Factor of the entries that dropout keeps, which preserves the mean for `p` rounded to a multiple of 2^-16."""
    return DROPOUT_RANGE / (DROPOUT_RANGE - threshold(p))


def _bits(rows: int, entries: int, block: int, draw: Draw, dtype: np.dtype) -> np.ndarray:
    """[K, R, E] unsigned numbers, for each different seed."""
    blocks = -(-entries // block)
    seeds = dict.fromkeys(draw.seeds)
    first, second = (number % WORD for number in draw.position.tolist())
    drawn = []
    for seed in seeds:
        key = np.array([seed % WORD, draw.place], np.uint64)
        for start, end in _spans(rows, draw.rows):
            # NumPy increments the counter before it draws, so its first block is that of this counter + 1.
            counter = np.array([start * blocks, first, second, 0], np.uint64)
            drawn.append(np.random.Philox(counter=counter, key=key).random_raw((end - start) * blocks * 4))
    words = drawn[0] if len(drawn) == 1 else np.concatenate([*drawn, np.empty(0, np.uint64)])
    numbers = words.astype("<u8", copy=False).view(dtype)
    return numbers.reshape(len(seeds), rows, blocks * block)[:, :, :entries]


def _spans(rows: int, wanted: Tensor | None) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) of consecutive rows, in order."""
    if wanted is None:
        yield 0, rows
        return
    assert len(wanted) == rows
    numbers = wanted.cpu().numpy()
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    for span in np.split(numbers, cuts):
        if len(span):
            yield int(span[0]), int(span[-1]) + 1


def _of_heads(drawn: Tensor, draw: Draw) -> Tensor:
    """Expand [K, ...] of the different seeds to [M, ...] of the heads, without a copy if all heads share one seed."""
    if len(draw.seeds) == 1:
        return drawn[0]
    if len(drawn) == len(draw.seeds):
        return drawn
    if len(drawn) == 1:
        return drawn.expand(len(draw.seeds), *drawn.shape[1:])
    unique = list(dict.fromkeys(draw.seeds))
    return drawn[[unique.index(seed) for seed in draw.seeds]]
