"""Video file -> the T frames of a clip, chosen by a rule that gives the same frames every time."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
from numpy.typing import NDArray

from configs.schema import VideoConfig
from extract.datasets import Clip

# Frame rates whose gaps differ by less than this share of a frame are constant; containers round timestamps.
CONSTANT_RATE_TOLERANCE = 0.25


class VideoError(ValueError):
    """A clip cannot be decoded as asked; the message names the file and why."""


@dataclass(frozen=True)
class DecodedClip:
    """The frames of one clip.

    Attributes:
        frames: [T, H, W, 3] uint8, RGB.
        timestamps: [T] float32, seconds from the clip's start.
    """

    frames: NDArray[np.uint8]
    timestamps: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames is {self.frames.dtype} {self.frames.shape}; expected uint8 [T, H, W, 3]")
        if self.timestamps.shape != self.frames.shape[:1]:
            raise ValueError(f"timestamps has shape {self.timestamps.shape}; expected {self.frames.shape[:1]}")


def uniform_indices(count: int, frames: int) -> NDArray[np.int64]:
    """Middle frame of each of `frames` equal spans of `count` frames: int64 [frames], rising.

    The published evaluation rule: span i is [b_i, b_{i+1}) with b = linspace(0, count, frames + 1) cut to int, and its
    frame is (first + last) // 2. With fewer frames than spans some spans are empty; then each takes the frame that
    lies under its centre, so that the nearest frames repeat.
    """
    if count >= frames:
        bounds = np.linspace(0, count, frames + 1).astype(np.int64)
        return (bounds[:-1] + bounds[1:] - 1) // 2
    centres = (np.arange(frames) + 0.5) * count / frames
    return centres.astype(np.int64)


def uniform_by_time(starts_s: NDArray[np.float64], end_s: float, frames: int) -> NDArray[np.int64]:
    """The same rule where the frame rate varies: the frame on screen in the middle of each of `frames` equal spans.

    Args:
        starts_s: [count] time at which each frame appears, rising.
        end_s: time at which the last one disappears.
        frames: T.

    Returns:
        int64 [frames], rising.
    """
    centres = starts_s[0] + (np.arange(frames) + 0.5) * (end_s - starts_s[0]) / frames
    return np.clip(np.searchsorted(starts_s, centres, side="right") - 1, 0, len(starts_s) - 1)


def read_frames(clip: Clip, video: VideoConfig) -> DecodedClip:
    """Decode the frames of `clip`.

    Runs FFmpeg in this process: a damaged file may hang it, so the extraction job calls this in a killable child
    (`extract.decode`).

    Raises:
        VideoError: the file is missing, empty, not a video, damaged, has no frame within the clip, or has fewer than
            `video.frames` and `video.short` is `quarantine`.
    """
    reader = _open(clip.video)
    with _decoder_errors(clip.video):
        # [frames, 2]: when each frame appears and disappears, in presentation order.
        times = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)
    rows = _rows_within(clip, times)
    chosen = _choose(clip, times[rows], video)
    with _decoder_errors(clip.video):
        frames = _pixels(reader, rows[chosen].tolist())
    start_s = times[rows[0], 0] if clip.start_s is None else clip.start_s
    timestamps = (times[rows[chosen], 0] - start_s).astype(np.float32)
    missing = video.frames - len(chosen)
    if missing > 0:  # video.short is zeros: black frames at the end, as the published loader pads
        frames = np.concatenate([frames, np.zeros((missing, *frames.shape[1:]), np.uint8)])
        timestamps = np.concatenate([timestamps, np.repeat(timestamps[-1:], missing)])
    return DecodedClip(frames, timestamps)


def _open(path: Path) -> "decord.VideoReader":
    if not path.is_file():
        raise VideoError(f"video {path} does not exist; put the file there or correct the annotation")
    if path.stat().st_size == 0:
        raise VideoError(f"video {path} is empty (0 bytes); fetch it again")
    decord.logging.set_level(decord.logging.QUIET)
    with _decoder_errors(path):
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    if len(reader) == 0:
        raise VideoError(f"video {path} has no frames; fetch it again")
    return reader


@contextlib.contextmanager
def _decoder_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        # decord puts the time and its own source line before each part of its message, which goes over many lines.
        lines = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", str(error)).strip().splitlines()
        raise VideoError(f"video {path} cannot be decoded: {lines[0] if lines else type(error).__name__}") from error


def _pixels(reader: "decord.VideoReader", rows: list[int]) -> NDArray[np.uint8]:
    """[len(rows), H, W, 3] uint8."""
    height, width, channels = reader[rows[0]].shape
    if channels == 3:
        return reader.get_batch(rows).asnumpy()
    # decord takes a row's bytes over its width for the number of channels. At small widths such as 96 and 144 the
    # padding of FFmpeg's rows makes that 4, and get_batch fails; frame by frame the padding can be cut off.
    padded = np.stack([reader[row].asnumpy().reshape(height, width * channels) for row in rows])
    return padded[:, :, : width * 3].reshape(len(rows), height, width, 3)


def _rows_within(clip: Clip, times: NDArray[np.float64]) -> NDArray[np.int64]:
    start = -np.inf if clip.start_s is None else clip.start_s
    end = np.inf if clip.end_s is None else clip.end_s
    rows = np.flatnonzero((times[:, 0] >= start) & (times[:, 0] < end))
    if len(rows) == 0:
        raise VideoError(
            f"clip {clip.clip_id} is [{clip.start_s}, {clip.end_s}) s of {clip.video}, which ends at"
            f" {times[-1, 1]:.3f} s; no frame lies within"
        )
    return rows


def _choose(clip: Clip, times: NDArray[np.float64], video: VideoConfig) -> NDArray[np.int64]:
    count = len(times)
    if count < video.frames:
        if video.short == "quarantine":
            raise VideoError(f"clip {clip.clip_id} has {count} frames; video.frames asks for {video.frames}")
        if video.short == "zeros":
            return np.arange(count)
        return uniform_indices(count, video.frames)
    gaps = np.diff(times[:, 0])
    if len(gaps) and np.ptp(gaps) > CONSTANT_RATE_TOLERANCE * np.median(gaps):
        return uniform_by_time(times[:, 0], float(times[-1, 1]), video.frames)
    return uniform_indices(count, video.frames)
