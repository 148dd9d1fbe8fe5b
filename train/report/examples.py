"""Example questions of the report: their choice, and their frames with the kept patches drawn over them.

An example shows the frames that the network saw, cropped in the same way. The kept patches are drawn over the picture
as vectors, so one picture serves every selection ratio.
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
from egopatch.features.values.spec import middle_indices

# Decoding is imported only when pictures are drawn: it takes long to load, and reading results never needs it.
if TYPE_CHECKING:
    from egopatch.extract.feed.clips import PreparedClip
    from egopatch.extract.video.indexing.cache import VideoCache
    from egopatch.extract.video.transforms import Transform

PICTURE_SIDE = 224
MAX_FRAMES = 8
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class Answer:
    """The answer of one system."""

    system: str
    text: str
    right: bool


@dataclass(frozen=True)
class Overlay:
    """Kept patches of one frame as SVG path data in patch units: the area to dim, and the outline to draw."""

    dimmed: str
    outline: str


@dataclass(frozen=True)
class Step:
    """One selection ratio of an example: an overlay per shown frame, and the head's answer at that ratio."""

    label: str
    overlays: tuple[Overlay, ...]
    answer: Answer


@dataclass(frozen=True)
class Example:
    """One question of the report.

    Attributes:
        kind: `win`, `loss` or `drawn`.
        pictures: JPEGs as data URIs, one per shown frame; empty if the video cannot be shown.
        missing: Why there are no pictures; empty if there are some.
        steps: The head's selection at each ratio.
        answers: Answers of every system.
    """

    kind: str
    question: Question
    pictures: tuple[str, ...]
    missing: str
    steps: tuple[Step, ...]
    answers: tuple[Answer, ...]


def choose(
    clip_of: Mapping[str, str], ours: Mapping[str, bool], others: Sequence[Mapping[str, bool]], count: int
) -> list[tuple[str, str]]:
    """Choose wins (ours is right, some other is not), losses (ours is wrong, some other is not) and random questions.

    Wins with the fewest other systems right come first, losses with the most. The random questions are drawn before the
    other two kinds and without looking at any answer. No question is chosen twice; wins and losses avoid clips that are
    already shown as long as there are others.

    Args:
        clip_of: Clip of each question, by id.
        ours: Whether our answer is right, by id.
        others: The same for each other system.
        count: Number of questions of each kind.

    Returns:
        (kind, id) pairs: wins, losses, then those drawn.
    """
    order = sorted(clip_of)
    random.Random(0).shuffle(order)

    def rivals(question: str) -> int:
        return sum(other[question] for other in others)

    drawn = order[:count]
    taken, shown_clips = set(drawn), {clip_of[question] for question in drawn}

    def choose_from(pool: Sequence[str]) -> list[str]:
        chosen: list[str] = []
        for only_new_clips in (True, False):
            for question in pool:
                stale = only_new_clips and clip_of[question] in shown_clips
                if len(chosen) < count and question not in taken and not stale:
                    chosen.append(question)
                    taken.add(question)
                    shown_clips.add(clip_of[question])
        return chosen

    wins = choose_from(sorted((q for q in order if ours[q] and rivals(q) < len(others)), key=rivals))
    losses = choose_from(sorted((q for q in order if not ours[q] and rivals(q)), key=rivals, reverse=True))
    return [("win", q) for q in wins] + [("loss", q) for q in losses] + [("drawn", q) for q in drawn]


def overlay(kept: NDArray[np.integer], grid: tuple[int, int]) -> Overlay:
    """Draw the kept patches of one frame.

    Args:
        kept: [k] row-major patch indices; those outside the grid, such as padding, are ignored.
        grid: Rows and columns of patches.
    """
    rows, cols = grid
    mask = np.zeros((rows + 2, cols + 2), dtype=bool)
    inside = kept[(kept >= 0) & (kept < rows * cols)]
    mask[1 + inside // cols, 1 + inside % cols] = True
    dimmed = "".join(f"M{c} {r}h{width}v1h-{width}z" for r, c, width in _runs(~mask[1:-1, 1:-1]))
    # An edge is drawn between a kept patch and one that is not kept.
    across = np.argwhere(mask[:-1, 1:-1] != mask[1:, 1:-1])
    down = np.argwhere(mask[1:-1, :-1] != mask[1:-1, 1:])
    outline = "".join(f"M{c} {r}h1" for r, c in across.tolist()) + "".join(f"M{c} {r}v1" for r, c in down.tolist())
    return Overlay(dimmed, outline)


def shown_frames(frames: int) -> list[int]:
    """Indices of the frames to show: all of up to eight, else eight spread evenly."""
    return middle_indices(frames, min(frames, MAX_FRAMES))


def prepare_picture(clip: Clip, video: VideoConfig, cache: "VideoCache", transform: "Transform") -> "PreparedClip":
    """Decode a clip's frames and crop them as for the encoder, but keep them viewable. Runs in a decoder process.

    Returns:
        Frames [T, 3, 224, 224] in [0, 1]. The crop is the encoder's, whatever `video.size` is, so that a patch grid
        laid over the picture covers the pixels of the patches.

    Raises:
        VideoError: As `extract.video.frames.read_frames`.
    """
    from egopatch.extract.feed.clips import PreparedClip
    from egopatch.extract.feed.on_host import crop_and_resize
    from egopatch.extract.video.frames import read_frames

    started = time.perf_counter()
    decoded = read_frames(clip, video, cache)
    shown = crop_and_resize(decoded.frames, PICTURE_SIDE, transform).numpy()
    return PreparedClip(clip, shown, decoded.timestamps, "", 0, time.perf_counter() - started)


def pictures(
    clips: Sequence[Clip], video: VideoConfig, transform: "Transform", read: Sequence[int]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """For each clip, yield its shown frames as data URIs and "", or no pictures and the reason.

    Args:
        clips: Clips to show.
        video: Options by which their frames were chosen.
        transform: The encoder's transform.
        read: Indices of the frames that the head reads; of these, `shown_frames` are shown.
    """
    from egopatch.extract.feed.pool import DecodePool, UndecodedClip

    if not clips:
        return
    with DecodePool(video, workers=1, prepare=partial(prepare_picture, transform=transform)) as pool:
        for result in pool.map(clips):
            if isinstance(result, UndecodedClip):
                yield (), result.reason
            else:
                frames = result.frames
                assert isinstance(frames, np.ndarray)
                yield tuple(data_uri(frames[read[t]]) for t in shown_frames(len(read))), ""


def data_uri(pixels_chw: NDArray[np.float32]) -> str:
    """A [3, H, W] picture in [0, 1] as the data URI of a JPEG."""
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
