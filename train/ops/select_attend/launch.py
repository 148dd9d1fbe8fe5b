"""How the kernels are cut for a shape: what they take, and the shipped table of block sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_PATCHES = 1024
MAX_WIDTH = 1024
# Up to so many patches a frame is one block, whose scores and logits stay in registers between the two reads.
ONE_BLOCK = 256
ONE_BLOCK_FLOAT32 = 128


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is cut.

    Attributes:
        block: patches at a time, a power of two.
        heads: in a program at a time; each brings 16 columns.
        channels: at a time.
        warps: of a program.
        stages: of the pipelined loads.
        select_block: patches at a time while selecting, which takes all of them at once.
        select_channels: channels at a time while selecting.
    """

    block: int
    heads: int
    channels: int
    warps: int
    stages: int
    select_block: int
    select_channels: int


def launch_config(patches: int, width: int, heads: int, token_bytes: int, backward: bool, wide: bool) -> LaunchConfig:
    """The shipped configuration; `benchmarks/kernel_budget.py` checks each for spills and shared memory."""
    float32 = token_bytes == 4
    whole = max(16, _power_of_two(patches))
    several = whole > (ONE_BLOCK_FLOAT32 if float32 else ONE_BLOCK)
    block = (64 if float32 else 128) if several else whole
    # What takes registers: one-byte tokens, widened in them; float32, multiplied in three parts; 64-bit offsets; and
    # the addresses of a backward program that goes over its blocks twice, or over many channels.
    channels = {1: 32 if block > 128 else 64, 2: 64, 4: 16}[token_bytes]
    together = 2 if backward or wide or (several and float32) else 4
    if float32 and (wide or (several and backward)):
        together = 1
    if wide:
        channels = 16
    elif (backward and (several or width > 768)) or (several and token_bytes == 1):
        channels = min(channels, 32)
    return LaunchConfig(
        block=block,
        heads=min(together, _power_of_two(heads)),
        channels=_divisor(width, channels),
        warps=4 if block <= 64 and not float32 else 8,
        stages=2,
        select_block=whole,
        select_channels=8 if float32 else 16,
    )


def is_wide(tokens: Tensor, queries: Tensor) -> bool:
    """Whether offsets in a frame or in the outputs need 64 bits, which cost registers; clips' always have."""
    frames, patches, width = tokens.shape[1:]
    questions, heads = queries.shape[:2]
    return max(patches * tokens.stride(2), questions * frames * max(patches, heads * width)) >= 2**31


def refusal(tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take these tokens and queries of `dtype`: what is wrong and what they expect, or None."""
    if dtype == torch.float64:
        return "queries is torch.float64; expected at most float32"
    if tokens.shape[2] > MAX_PATCHES:
        return f"tokens has {tokens.shape[2]} patches; expected at most {MAX_PATCHES}"
    if tokens.shape[3] > MAX_WIDTH or tokens.shape[3] % 16:
        return f"tokens has {tokens.shape[3]} channels; expected a multiple of 16 up to {MAX_WIDTH}"
    if tokens.stride(3) != 1:
        return f"tokens has strides {tokens.stride()}; expected 1 last, as .contiguous() gives"
    return None


def _power_of_two(number: int) -> int:
    """`number` rounded up to one."""
    return 1 << (number - 1).bit_length()


def _divisor(width: int, channels: int) -> int:
    """`channels`, halved until it divides `width`."""
    while width % channels:
        channels //= 2
    return channels
