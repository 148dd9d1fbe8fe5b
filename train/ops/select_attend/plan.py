"""The launch plan: which implementation runs, how its kernels are cut, and how questions are grouped into programs.

`make_plan` decides everything that follows from the shapes once, before anything runs. `schedule` groups the questions
by clip, on the device, since that follows from their values.

Shape legend: C clips, B questions, T frames, N patches a frame, D channels, H attention heads.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "reference", "triton"]

MAX_PATCHES = 1024
MAX_WIDTH = 1024
# Up to this many patches a frame is one block, whose scores and logits stay in registers between the two reads.
ONE_BLOCK = 256
ONE_BLOCK_FLOAT32 = 128
# Questions of one clip in a program; tensor-core products with fewer rows are wrong or slow.
QUESTIONS = 16


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a kernel.

    Attributes:
        block: Patches at a time, a power of two.
        heads: Heads at a time in a program; each adds 16 columns.
        channels: Channels at a time.
        warps: Warps of a program.
        stages: Stages of the pipelined loads.
        select_block: Patches at a time during selection, which reads all patches at once.
        select_channels: Channels at a time during selection.
    """

    block: int
    heads: int
    channels: int
    warps: int
    stages: int
    select_block: int
    select_channels: int

    @property
    def several(self) -> bool:
        """Whether a frame takes several blocks."""
        return self.block < self.select_block


@dataclass(frozen=True)
class Launch:
    """How the kernels are cut.

    Attributes:
        wide: Whether offsets in a frame or in the outputs need 64 bits, which cost registers; clips' always have them.
        forward: Block sizes of the forward kernel.
        backward: Block sizes of the backward kernel.
    """

    wide: bool
    forward: Blocks
    backward: Blocks

    def as_numbers(self) -> list[int]:
        """The launch as integers, because registered operators accept only tensors and numbers."""
        return [int(self.wide), *astuple(self.forward), *astuple(self.backward)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "Launch":
        """The launch that `as_numbers` wrote."""
        wide, *sizes = numbers
        half = len(sizes) // 2
        return cls(bool(wide), Blocks(*sizes[:half]), Blocks(*sizes[half:]))


@dataclass(frozen=True)
class Plan:
    """Everything about a call that its shapes, dtypes and devices decide.

    Attributes:
        implementation: `reference` or `triton`.
        reason: Why this implementation runs, for a log.
        launch: How the kernels are cut; None for the reference.
    """

    implementation: Literal["reference", "triton"]
    reason: str
    launch: Launch | None


def make_plan(tokens: Tensor, queries: Tensor, implementation: Implementation) -> Plan:
    """The plan of a call with these tokens and queries.

    Raises:
        ValueError: As for `choose_implementation`.
    """
    chosen, reason = choose_implementation(tokens, queries.dtype, implementation)
    return Plan(chosen, reason, plan_launch(tokens, queries) if chosen == "triton" else None)


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
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; expected it (pip install triton)"
    if not tokens.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tokens is on {tokens.device}; expected a CUDA device"
    if dtype == torch.float64:
        return "queries is torch.float64; expected at most float32"
    if tokens.shape[2] > MAX_PATCHES:
        return f"tokens has {tokens.shape[2]} patches; expected at most {MAX_PATCHES}"
    if tokens.shape[3] > MAX_WIDTH or tokens.shape[3] % 16:
        return f"tokens has {tokens.shape[3]} channels; expected a multiple of 16 up to {MAX_WIDTH}"
    if tokens.stride(3) != 1:
        return f"tokens has strides {tokens.stride()}; expected 1 last, as .contiguous() gives"
    return None


def plan_launch(tokens: Tensor, queries: Tensor) -> Launch:
    """How the kernels are cut for these arguments."""
    frames, patches, width = tokens.shape[1:]
    questions, heads = queries.shape[:2]
    wide = max(patches * tokens.stride(2), questions * frames * max(patches, heads * width)) >= 2**31
    forward, backward = (
        _blocks(int(patches), int(width), int(heads), tokens.element_size(), backward, wide)
        for backward in (False, True)
    )
    return Launch(wide, forward, backward)


def _blocks(patches: int, width: int, heads: int, token_bytes: int, backward: bool, wide: bool) -> Blocks:
    """The shipped block sizes; `benchmarks/kernel_budget.py` checks each for spills and shared memory."""
    float32 = token_bytes == 4
    whole = max(16, _power_of_two(patches))
    several = whole > (ONE_BLOCK_FLOAT32 if float32 else ONE_BLOCK)
    block = (64 if float32 else 128) if several else whole
    # These cost registers: one-byte tokens, which are widened; float32, multiplied in three parts; 64-bit offsets; and
    # the addresses of a backward program that reads its blocks twice, or many channels.
    channels = {1: 32 if block > 128 else 64, 2: 64, 4: 16}[token_bytes]
    together = 2 if backward or wide or (several and float32) else 4
    if float32 and (wide or (several and backward)):
        together = 1
    if wide:
        channels = 16
    elif (backward and (several or width > 768)) or (several and token_bytes == 1):
        channels = min(channels, 32)
    return Blocks(
        block=block,
        heads=min(together, _power_of_two(heads)),
        channels=_divisor(width, channels),
        warps=4 if block <= 64 and not float32 else 8,
        stages=2,
        select_block=whole,
        select_channels=8 if float32 else 16,
    )


def _power_of_two(number: int) -> int:
    """`number` rounded up to a power of two."""
    return 1 << (number - 1).bit_length()


def _divisor(width: int, channels: int) -> int:
    """`channels`, halved until it divides `width`."""
    while width % channels:
        channels //= 2
    return channels


def schedule(clip_index: Tensor, clips: int, clip_rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Group the questions by clip and cut each group into tiles of `QUESTIONS`, without waiting for the device.

    One read of a frame then serves up to `QUESTIONS` questions.

    Args:
        clip_index: [B] clip of each question.
        clips: Number of clips.
        clip_rows: [C] row of the tokens of each clip; None if the rows are the clips.

    Returns:
        order [B], the questions sorted by clip; tiles [G, 4], the clip of each tile, its first place in `order`, its
        number of questions (0 in unused tiles) and its row of the tokens; clip_tiles [C + 1], first tile of each clip.
    """
    device = clip_index.device
    sorted_clips, order = torch.sort(clip_index, stable=True)
    edges = torch.searchsorted(sorted_clips, torch.arange(clips + 1, dtype=clip_index.dtype, device=device))
    per_clip = (edges.diff() + QUESTIONS - 1) // QUESTIONS
    clip_tiles = torch.cat([per_clip.new_zeros(1), per_clip.cumsum(0)])
    tile = torch.arange(tile_bound(len(clip_index), clips), device=device)
    clip = torch.searchsorted(clip_tiles, tile, right=True) - 1
    unused = clip >= clips
    clip = clip.clamp_max(clips - 1)
    first = edges[clip] + (tile - clip_tiles[clip]) * QUESTIONS
    count = (edges[clip + 1] - first).clamp(0, QUESTIONS).masked_fill(unused, 0)
    row = clip if clip_rows is None else clip_rows[clip]
    return order.int(), torch.stack([clip, first, count, row], dim=1).int(), clip_tiles.int()


def tile_bound(questions: int, clips: int) -> int:
    """G, the number of tiles that suffices for every assignment of questions to clips."""
    return min(questions, clips + questions // QUESTIONS)
