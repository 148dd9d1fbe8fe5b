"""Example questions of the report: which ones, and the frames with the kept patches on them.

An example is shown as the network saw it: the same frames, the same crop. The kept patches are drawn over the picture
as vectors, so that one picture serves every selection ratio.
"""

import base64
import io
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip, Question

if TYPE_CHECKING:
    from egopatch.extract.video.decode import PreparedClip
    from egopatch.extract.video.transforms import Transform

PICTURE_SIDE = 224
MAX_FRAMES = 8
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class Answer:
    """What one system answered."""

    system: str
    text: str | None
    right: bool


@dataclass(frozen=True)
class Overlay:
    """Kept patches of one frame as SVG path data in patch units: what to darken, and the outline of what was kept."""

    dimmed: str
    outline: str


@dataclass(frozen=True)
class Step:
    """One selection ratio of an example: its overlays, one a frame shown, and what the head answered at that ratio."""

    label: str
    overlays: tuple[Overlay, ...]
    answer: Answer


@dataclass(frozen=True)
class Example:
    """One question of the report.

    Attributes:
        kind: `win`, `loss` or `drawn`.
        pictures: JPEGs as data URIs, one a frame shown; empty where the video cannot be shown.
        missing: why there are no pictures; empty where there are.
        steps: the head's selection, by ratio; the first is the run in the table.
        answers: of every system.
    """

    kind: str
    question: Question
    pictures: tuple[str, ...]
    missing: str
    steps: tuple[Step, ...]
    answers: tuple[Answer, ...]


def choose(
    questions: Sequence[str],
    ours: Mapping[str, bool],
    others: Sequence[Mapping[str, bool]],
    each: int,
    seed: int = 0,
    clips: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    """Choose wins (ours is right, others are not), losses (ours is wrong, others are not) and random questions.

    Wins with the fewest other systems right come first, losses with the most. The random ones are drawn before the
    other two kinds and without looking at any answer. No question is shown twice; wins and losses keep to clips that
    are not shown yet while there are any.

    Args:
        questions: ids to draw from.
        ours: whether our answer is right, by id.
        others: the same of each other system.
        each: how many of each kind.
        seed: of the draw.
        clips: clip of each id.

    Returns:
        (kind, id) pairs: wins, losses, then those drawn.
    """
    order = sorted(questions)
    random.Random(seed).shuffle(order)
    clip_of = clips or {question: question for question in order}

    def rivals(question: str) -> int:
        return sum(other.get(question, False) for other in others)

    drawn = order[:each]
    taken, seen = set(drawn), {clip_of[question] for question in drawn}

    def take(pool: Sequence[str]) -> list[str]:
        chosen: list[str] = []
        for only_new_clips in (True, False):
            for question in pool:
                stale = only_new_clips and clip_of[question] in seen
                if len(chosen) < each and question not in taken and not stale:
                    chosen.append(question)
                    taken.add(question)
                    seen.add(clip_of[question])
        return chosen

    wins = take(sorted((q for q in order if ours.get(q, False) and rivals(q) < len(others)), key=rivals))
    losses = take(sorted((q for q in order if not ours.get(q, False) and rivals(q)), key=rivals, reverse=True))
    return [("win", q) for q in wins] + [("loss", q) for q in losses] + [("drawn", q) for q in drawn]


def overlay(kept: NDArray[np.integer], grid: tuple[int, int]) -> Overlay:
    """Draw the kept patches of one frame.

    Args:
        kept: [k] row-major patch indices; those outside the grid, such as padding, are passed over.
        grid: rows and columns of patches.
    """
    rows, cols = grid
    mask = np.zeros((rows + 2, cols + 2), dtype=bool)
    inside = kept[(kept >= 0) & (kept < rows * cols)]
    mask[1 + inside // cols, 1 + inside % cols] = True
    dimmed = "".join(f"M{c} {r}h{width}v1h-{width}z" for r, c, width in _runs(~mask[1:-1, 1:-1]))
    # An edge is drawn where a kept patch meets one that is not.
    across = np.argwhere(mask[:-1, 1:-1] != mask[1:, 1:-1])
    down = np.argwhere(mask[1:-1, :-1] != mask[1:-1, 1:])
    outline = "".join(f"M{c} {r}h1" for r, c in across.tolist()) + "".join(f"M{c} {r}v1" for r, c in down.tolist())
    return Overlay(dimmed, outline)


def shown_frames(frames: int) -> list[int]:
    """Which of a clip's frames are shown: all up to eight, else eight spread evenly."""
    if frames <= MAX_FRAMES:
        return list(range(frames))
    return [int((i + 0.5) * frames / MAX_FRAMES) for i in range(MAX_FRAMES)]


def prepare_picture(clip: Clip, video: VideoConfig, transform: "Transform") -> "PreparedClip":
    """Decode a clip's frames and crop them as for the encoder, but keep them viewable. Runs in a decoder child.

    Returns:
        Frames [T, 3, 224, 224] in [0, 1]. The crop is the encoder's whatever `video.size` is, so a patch grid laid
        over the picture covers the pixels that the patches were made of.

    Raises:
        VideoError: as `extract.video.frames.read_frames`.
    """
    from egopatch.extract.video.decode import PreparedClip
    from egopatch.extract.video.frames import read_frames
    from egopatch.extract.video.transforms import crop_and_resize

    started = time.perf_counter()
    decoded = read_frames(clip, video)
    shown = crop_and_resize(decoded.frames, PICTURE_SIDE, transform).numpy()
    return PreparedClip(clip, shown, decoded.timestamps, "", time.perf_counter() - started)


def pictures(
    clips: Sequence[Clip], video: VideoConfig, transform: "Transform"
) -> Iterator[tuple[tuple[str, ...], str]]:
    """For each clip its shown frames as data URIs and "", or no pictures and why; `transform` is the encoder's."""
    # Decoding is imported here alone: reading results and training never need it.
    from egopatch.extract.video.decode import DecodePool, UndecodedClip

    if not clips:
        return
    with DecodePool(video, workers=1, prepare=partial(prepare_picture, transform=transform)) as pool:
        for result in pool.map(clips):
            if isinstance(result, UndecodedClip):
                yield (), result.reason
            else:
                yield tuple(data_uri(result.frames[t]) for t in shown_frames(len(result.frames))), ""


def data_uri(pixels_chw: NDArray[np.float32]) -> str:
    """JPEG of a [3, H, W] picture in [0, 1] as a data URI."""
    pixels = (np.clip(pixels_chw, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _runs(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
    """(row, first column, width) of each horizontal stretch of true."""
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], line, [False])).astype(np.int8)))
        for start, stop in edges.reshape(-1, 2).tolist():
            yield row, start, stop - start
