"""Groups the questions by clip and cuts each group into tiles, in one launch and without waiting for the device.

One read of a frame then serves up to `QUESTIONS` questions. Legend in `kernels.py`; G is the number of tiles.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from egopatch.train.ops.select_attend.plan import QUESTIONS, tile_bound

# Number of questions that a program reads together.
CHUNK = 1024


def schedule(
    clip_index: Tensor, clips: int, clip_rows: Tensor | None = None, stored: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Group the questions by clip.

    Args:
        clip_index: [B] clip of each question.
        clips: Number of clips.
        clip_rows: [C] each clip's row of the tokens; None if row c holds clip c.
        stored: Number of rows of the tokens; `clips` if it is None.

    Returns:
        order [B], the questions sorted by clip; tiles [G, 4], the clip of each tile, its first place in `order`, its
        number of questions (0 in unused tiles) and its row of the tokens; clip_tiles [C, 2], the first tile of each
        clip and the end of the tiles that it uses. All are int32.
    """
    questions, device = len(clip_index), clip_index.device
    stored = clips if stored is None else stored
    order = torch.empty(questions, dtype=torch.int32, device=device)
    tiles = torch.empty(tile_bound(questions, clips), 4, dtype=torch.int32, device=device)
    clip_tiles = torch.empty(clips, 2, dtype=torch.int32, device=device)
    valid = torch.empty(clips, dtype=torch.bool, device=device)
    if clips:
        schedule_kernel[(clips,)](
            clip_index.contiguous(), None if clip_rows is None else clip_rows.contiguous(),
            order, tiles, clip_tiles, valid, questions, clips, stored,
            HAS_ROWS=clip_rows is not None, QB=QUESTIONS, CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
    # Checked on the device, since reading the result here would wait for it.
    expected = f"clip_index is not within 0 to {clips - 1}, or clip_rows is not within 0 to {stored - 1}"
    torch._assert_async(valid.all(), expected)
    return order, tiles, clip_tiles


@triton.jit(do_not_specialize=["questions", "clips", "stored"])
def schedule_kernel(
    clip_index, clip_rows, order, tiles, clip_tiles, valid, questions, clips, stored,
    HAS_ROWS: tl.constexpr, QB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Order and tiles of the questions about one clip, and whether its row is one of the tokens' rows.

    The programs of the first and the last clip also check that no question's clip is out of range.

    The tiles of a clip begin at its number plus the number of tiles that earlier questions fill, rounded down. So each
    clip has room for its own tiles, the last of which may stay unused, and no program needs to know the others' tiles.
    """
    clip = tl.program_id(0)
    places = tl.arange(0, CHUNK)
    earlier = tl.zeros((CHUNK,), tl.int32)
    own = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, questions, CHUNK):
        question = start + places
        other = tl.load(clip_index + question, mask=question < questions, other=clips)
        earlier += (other < clip).to(tl.int32)
        own += (other == clip).to(tl.int32)
    first = tl.sum(earlier, axis=0)
    count = tl.sum(own, axis=0)
    row = clip
    if HAS_ROWS:
        row = tl.load(clip_rows + clip).to(tl.int32)
    inside = (row >= 0) & (row < stored)
    inside &= (clip > 0) | (first == 0)
    inside &= (clip < clips - 1) | (first + count == questions)
    tl.store(valid + clip, inside)

    place = first
    for start in range(0, questions, CHUNK):
        question = start + places
        mine = tl.load(clip_index + question, mask=question < questions, other=clips) == clip
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order + place + rank - 1, question, mask=mine)
        place += tl.sum(mine.to(tl.int32), axis=0)

    begin = clip + first // QB
    for i in range(0, clip + 1 + (first + count) // QB - begin):
        tile = tiles + (begin + i) * 4
        tl.store(tile, clip)
        tl.store(tile + 1, first + i * QB)
        tl.store(tile + 2, tl.minimum(tl.maximum(count - i * QB, 0), QB))
        tl.store(tile + 3, row)
    tl.store(clip_tiles + clip * 2, begin)
    tl.store(clip_tiles + clip * 2 + 1, begin + (count + QB - 1) // QB)
