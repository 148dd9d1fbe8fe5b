"""The launch plan: which implementation runs, with which block sizes, for given shapes, dtypes and device.

Shape legend: C clips, B questions, T frames, N patches a frame, D channels, H attention heads.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from egopatch.features.common import machine

Implementation = Literal["auto", "reference", "triton"]

# Looked up once, since torch.compile cannot trace the lookup.
TRITON = version("triton") if find_spec("triton") is not None else None
SPILLING_TRITON = TRITON is not None and machine.release(TRITON) >= machine.SPILLING_TRITON

MAX_PATCHES = 1024
MAX_WIDTH = 1536
# Up to this many patches a frame is one block, whose scores and logits stay in registers between the two reads.
ONE_BLOCK = 256
ONE_BLOCK_FLOAT32 = 128
# Bytes.
ALIGNMENT = 16
# Questions of one clip in a program; tensor-core products with fewer rows are wrong or slow.
QUESTIONS = 16


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a kernel that scores a frame.

    Attributes:
        block: Patches at a time, a power of two.
        heads: Heads at a time in a program; each adds 16 columns.
        channels: Channels at a time, a divisor of D.
        stages: Stages of the pipelined loads.
        warps: Warps of a program.
        registers: Most registers of a thread; 0 leaves it to the assembler.
        chunk: Scores of a frame that the selection holds in one tensor.
        pool_channels: Channels at a time while pooling.
        pool_stages: Stages of the pipelined loads while pooling.
    """

    block: int
    heads: int
    channels: int
    stages: int
    warps: int
    registers: int
    chunk: int
    pool_channels: int
    pool_stages: int


@dataclass(frozen=True)
class Product:
    """Block sizes of the product that gives the gradient of the queries.

    Attributes:
        rows: Columns of a tile at a time.
        patches: Patches at a time, at most a block of the backward kernel.
        channels: Channels of a program.
        warps: Warps of a program.
        stages: Stages of the pipelined loads.
    """

    rows: int
    patches: int
    channels: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """Block sizes of all kernels.

    Attributes:
        forward: Block sizes of the forward kernel.
        backward: Block sizes of the kernel that computes the gradients of the logits.
        product: Block sizes of the kernel that computes the gradient of the queries from them.
    """

    forward: Blocks
    backward: Blocks
    product: Product


def choose_implementation(
    tokens: Tensor, dtype: torch.dtype, implementation: Implementation
) -> tuple[Literal["reference", "triton"], str]:
    """The implementation that runs for these tokens and queries of `dtype`, and the reason, for a log.

    Raises:
        ValueError: `implementation` is unknown, or `triton` cannot run here.
    """
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(f"implementation is {implementation!r}; expected 'auto', 'reference' or 'triton'")
    if implementation == "reference":
        return "reference", "as requested"
    if implementation == "auto" and not tokens.is_cuda:
        return "reference", f"tokens are on {tokens.device}"
    obstacle = _obstacle(tokens, dtype)
    if implementation == "triton":
        if obstacle:
            raise ValueError(f"{obstacle} with implementation 'triton'; or use 'auto'")
        return "triton", "as requested"
    return ("reference", obstacle) if obstacle else ("triton", f"tokens are on {tokens.device}")


def _obstacle(tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run here, and what they expect; None if they can."""
    if TRITON is None:
        return "Triton is not installed; expected 3.6 or newer (pip install triton)"
    if machine.release(TRITON) < machine.OLDEST_TRITON:
        return f"Triton {TRITON} is installed; expected 3.6 or newer, which torch 2.10 and newer install"
    if not tokens.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tokens is on {tokens.device}; expected a CUDA device"
    # torch.compile cannot trace this look-up.
    if tokens.is_cuda and not torch.compiler.is_compiling() and (fault := machine.triton_fault(tokens.device)):
        return fault
    if dtype == torch.float64:
        return "queries is torch.float64; expected at most float32"
    if tokens.shape[2] > MAX_PATCHES:
        return f"tokens has {tokens.shape[2]} patches; expected at most {MAX_PATCHES}"
    if tokens.shape[3] > MAX_WIDTH or tokens.shape[3] % 16:
        return f"tokens has {tokens.shape[3]} channels; expected a multiple of 16 up to {MAX_WIDTH}"
    if tokens.stride(3) != 1:
        return f"tokens has strides {tokens.stride()}; expected 1 last, as .contiguous() gives"
    # The GPU's copy engine reads rows that begin at multiples of 16 bytes. A dimension of one row may have any stride,
    # and torch.compile cannot trace an offset.
    offset = 0 if torch.compiler.is_compiling() else tokens.storage_offset()
    strides = [stride for stride, size in zip(tokens.stride()[:3], tokens.shape, strict=False) if size > 1]
    if any(start * tokens.element_size() % ALIGNMENT for start in (offset, *strides)):
        return (
            f"tokens has offset {offset} and strides {tokens.stride()}; expected multiples of {ALIGNMENT} bytes, as "
            ".contiguous() gives"
        )
    return None


@cache
def plan_launch(patches: int, width: int, heads: int, token_bytes: int, generation: int) -> Launch:
    """Block sizes of the kernels; `benchmarks/kernel_budget.py` checks each plan for spills and memory.

    Args:
        patches: N.
        width: D.
        heads: H.
        token_bytes: Bytes of a token's channel.
        generation: First number of the GPU's compute capability: 8 (A100; RTX 30 and 40), 9 (H100, H200), 10 (B200),
            12 (RTX 50).
    """
    forward, backward = (_blocks(patches, width, heads, token_bytes, generation, back) for back in (False, True))
    columns = -(-heads // backward.heads) * backward.heads * QUESTIONS
    float32, ampere = token_bytes == 4, _like_ampere(generation)
    # The largest number that does not spill with any version of Triton.
    patches = 16 if float32 and generation == 10 else 32 if float32 or ampere else 64
    # Three stages spill with Triton 3.9 in the first case, with 3.6 in the second.
    two_stages = (float32 and generation == 10) or (
        token_bytes == 1 and ampere and columns > 64 and not SPILLING_TRITON
    )
    product = Product(
        rows=next(rows for rows in (64, 32, 16) if columns % rows == 0),
        patches=min(backward.block, patches),
        channels=64 if float32 or ampere else 128,
        warps=4,
        stages=2 if two_stages else 3,
    )
    return Launch(forward, backward, product)


def _like_ampere(generation: int) -> bool:
    """Whether GPUs run what generation 8 does, whose blocks are the smallest.

    RTX 50 has its matrix instructions, and the 99 KB of shared memory of RTX 30 and 40.
    """
    return generation not in (9, 10)


def _blocks(patches: int, width: int, heads: int, token_bytes: int, generation: int, backward: bool) -> Blocks:
    """Block sizes of the forward or the backward kernel."""
    float32, ampere = token_bytes == 4, _like_ampere(generation)
    whole = max(16, _power_of_two(patches))
    several = whole > (ONE_BLOCK_FLOAT32 if float32 else ONE_BLOCK)
    block = (64 if float32 else 128) if several else whole
    # Measured on an H100 with Triton 3.6 (docs/kernels.md); from 3.8 on these sizes spill. Elsewhere, as many heads,
    # channels and stages are used as compile without spills.
    tuned = generation == 9 and token_bytes == 2 and not SPILLING_TRITON
    together, channels, pool_channels = 4, 64, 64
    if float32:
        together, channels, pool_channels = 1, 16 if ampere else 32, 32
    elif ampere:
        together, channels, pool_channels = 1 if backward and token_bytes == 1 else 2, 32, 32
    elif several or generation == 10 or (backward and not tuned):
        together = 2
    if not float32 and not ampere and not backward and (tuned or generation == 10 or (several and token_bytes == 1)):
        channels, pool_channels = 32, 32 if generation == 10 else 64
    if ampere and several and not backward:
        together, pool_channels = 1, 16
    stages = 2 if float32 else 4 if tuned and not backward else 3
    registers = 128 if tuned and not backward and not several and heads <= together else 0
    # With Triton 3.7 twice the channels and four stages spill here. Where the width is a power of two, two stages do.
    if tuned and backward and block == ONE_BLOCK and heads > together:
        channels = 32
    if float32 and generation == 10 and not backward and whole > 512:
        channels = 16
    if registers and patches == ONE_BLOCK and heads == together and width != _power_of_two(width):
        stages = 2
    # Two warpgroups need 128 rows: with fewer, Triton 3.6 addresses float32 columns wrongly (seen on an H100). On
    # Ampere, eight warps spill where a frame is one small block, and four where it is several.
    four_warps = block <= (128 if ampere and backward else 64) and not (ampere and several)
    if registers and four_warps:
        registers = 136  # of which the assembler takes 128; with 128, bfloat16 results spill
    if generation == 12 and (block < ONE_BLOCK or (backward and token_bytes == 1)):
        registers = 255  # without a limit, the assembler spills up to 152 bytes for one more program a multiprocessor
    # With Triton 3.8 these spill if the selection reads a question's scores in two halves; others, if it does not.
    unhalved = generation == 10 and SPILLING_TRITON and width > 768
    unhalved = unhalved and (patches == ONE_BLOCK or (token_bytes == 1 and width == _power_of_two(width)))
    return Blocks(
        block=block,
        heads=min(together, _power_of_two(heads)),
        channels=_divisor(width, channels),
        stages=stages,
        warps=4 if four_warps else 8,
        registers=registers,
        chunk=whole if whole > ONE_BLOCK or unhalved else min(whole, 128),
        pool_channels=_divisor(width, pool_channels),
        pool_stages=2,
    )


def _power_of_two(number: int) -> int:
    """`number` rounded up to a power of two."""
    return 1 << (number - 1).bit_length()


def _divisor(width: int, channels: int) -> int:
    """`channels`, halved until it divides `width`."""
    while width % channels:
        channels //= 2
    return channels


def row_pitch(patches: int) -> int:
    """Row length of the scores and of the mask of kept patches.

    It is `patches` rounded up so that every row can be read in vectors: an odd pitch makes `logits_kernel` spill.
    """
    return -(-patches // 4) * 4


def tile_bound(questions: int, clips: int) -> int:
    """G, a number of tiles that suffices however the questions are spread over the clips."""
    return clips + questions // QUESTIONS
