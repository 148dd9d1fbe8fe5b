"""Video file -> the T frames of a clip, chosen by a deterministic rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.container import UnclearPackets, VideoFile, open_video
from egopatch.extract.video.decord_frames import decord_pixels
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.video.indexing.index import FrameIndex, VideoError
from egopatch.extract.video.planes import Planes
from egopatch.features.common.units import counted

# A frame rate is constant if its gaps differ by less than this share of a frame; containers round timestamps.
CONSTANT_RATE_TOLERANCE = 0.25


Picture = TypeVar("Picture", bound=NDArray[np.uint8] | Planes)


@dataclass(frozen=True)
class DecodedClip(Generic[Picture]):
    """The frames of one clip.

    Attributes:
        frames: T frames, each [H, W, 3] uint8, RGB, upright, or as planes; sizes may differ where the video changes
            its size.
        timestamps: [T] float32, seconds from the clip's start.
        times_s: [T] float64, seconds from the file's start.
        missing_s: Seconds by which the clip's end lies beyond its video's; 0 if it does not.
    """

    frames: tuple[Picture, ...]
    timestamps: NDArray[np.float32]
    times_s: NDArray[np.float64]
    missing_s: float = 0.0

    def __post_init__(self) -> None:
        for frame in self.frames:
            if isinstance(frame, Planes):
                continue
            if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
                raise ValueError(f"frames has one of {frame.dtype} {frame.shape}; expected uint8 [H, W, 3]")
        for name, times in (("timestamps", self.timestamps), ("times_s", self.times_s)):
            if times.shape != (len(self.frames),):
                raise ValueError(f"{name} has shape {times.shape}; expected {(len(self.frames),)}")


def uniform_indices(count: int, frames: int) -> NDArray[np.int64]:
    """Middle frame of each of `frames` equal spans of `count` frames: int64 [frames], rising.

    The published evaluation rule: span i is [b_i, b_{i+1}) with b = linspace(0, count, frames + 1) truncated to int,
    and its frame is (first + last) // 2. With fewer frames than spans some spans are empty; every span then takes the
    frame at its centre, so that the nearest frames repeat.
    """
    if count >= frames:
        bounds = np.linspace(0, count, frames + 1).astype(np.int64)
        return (bounds[:-1] + bounds[1:] - 1) // 2
    centres = (np.arange(frames) + 0.5) * count / frames
    return centres.astype(np.int64)


def uniform_by_time(starts_s: NDArray[np.float64], end_s: float, frames: int) -> NDArray[np.int64]:
    """The same rule for a variable frame rate: the frame on screen in the middle of each of `frames` equal spans.

    Args:
        starts_s: [count] time at which each frame appears, rising.
        end_s: Time at which the last frame disappears.
        frames: T.

    Returns:
        int64 [frames], rising.
    """
    centres = starts_s[0] + (np.arange(frames) + 0.5) * (end_s - starts_s[0]) / frames
    return np.clip(np.searchsorted(starts_s, centres, side="right") - 1, 0, len(starts_s) - 1)


def has_varying_rate(starts_s: NDArray[np.float64]) -> bool:
    """Whether frames that appear at these times, [count] and rising, have a varying rate, and are sampled by time."""
    gaps = np.diff(starts_s)
    return len(gaps) > 0 and bool(np.ptp(gaps) > CONSTANT_RATE_TOLERANCE * np.median(gaps))


def read_frames(clip: Clip, video: VideoConfig, cache: VideoCache | None = None) -> DecodedClip[NDArray[np.uint8]]:
    """Decode the frames of `clip`; `cache` remembers the frame index of its video for other clips.

    FFmpeg runs in this process, where a damaged file may make it hang; jobs therefore call this function in a child
    process that can be killed (`extract.feed.pool`).

    Raises:
        VideoError: The file is missing, unreadable, empty, not a video, damaged or truncated within the clip, has no
            frame there, or has fewer than `video.frames` and `video.short` is `quarantine`.
    """
    return _opened_and_read(clip, video, cache, as_planes=False)


def read_planes(
    clip: Clip, video: VideoConfig, cache: VideoCache | None = None
) -> DecodedClip[NDArray[np.uint8] | Planes]:
    """As `read_frames`, but frames whose colours can be converted later stay as the decoder returned them."""
    return _opened_and_read(clip, video, cache, as_planes=True)


def _opened_and_read(clip: Clip, video: VideoConfig, cache: VideoCache | None, as_planes: bool) -> DecodedClip[Any]:
    with open_video(clip.video, cache, on_gpu=video.decoder == "nvdec") as file:
        try:
            return _read(clip, video, file, as_planes)
        except UnclearPackets:
            file.decode_through()
            return _read(clip, video, file, as_planes)


def _read(clip: Clip, video: VideoConfig, file: VideoFile, as_planes: bool) -> DecodedClip[Any]:
    index = file.index
    chosen = sampled_rows(clip, index, rows_within(clip, index), video)
    frames: Sequence[NDArray[np.uint8] | Planes]
    if video.decoder == "decord":
        frames = decord_pixels(file, chosen)
    else:
        frames = file.planes(chosen) if as_planes else file.pixels(chosen)
    times_s = index.starts_s[chosen]
    missing = video.frames - len(chosen)
    if missing > 0:  # video.short is zeros: black frames at the end, as in the published loader
        frames = [*frames, *[np.zeros((*frames[-1].shape[:2], 3), np.uint8)] * missing]
        times_s = np.concatenate([times_s, np.repeat(times_s[-1:], missing)])
    missing_s = max(0.0, (clip.end_s or 0.0) - index.end_s)
    return DecodedClip(tuple(frames), (times_s - (clip.start_s or 0.0)).astype(np.float32), times_s, missing_s)


def rows_within(clip: Clip, index: FrameIndex) -> NDArray[np.int64]:
    """Rows of all frames that `clip` shows: int64 [count], consecutive.

    Raises:
        VideoError: There is no frame, or the file is truncated before the clip's end.
    """
    start = -np.inf if clip.start_s is None else clip.start_s
    end = np.inf if clip.end_s is None else clip.end_s
    if index.damage and end > index.end_s:
        raise VideoError(
            f"video {clip.video} is truncated at {index.end_s:.3f} s ({index.damage}), before the end of clip"
            f" {clip.clip_id}; download it again"
        )
    rows = np.flatnonzero((index.starts_s >= start) & (index.starts_s < end))
    if len(rows) == 0 and index.starts_s[0] <= start < index.end_s:
        # The clip lies between two frames: the first one is on screen.
        rows = np.searchsorted(index.starts_s, [start], side="right") - 1
    if len(rows) == 0:
        raise VideoError(
            f"clip {clip.clip_id} is {_stretch(clip)} of {clip.video}, but that video's frames are from "
            f"{index.starts_s[0]:.3f} to {index.end_s:.3f} s; correct the clip's times"
        )
    return rows


def _stretch(clip: Clip) -> str:
    """The clip's stretch in words; without an end it goes to the end of the file."""
    start = 0.0 if clip.start_s is None else clip.start_s
    return f"all from {start} s on" if clip.end_s is None else f"[{start}, {clip.end_s}) s"


def sampled_rows(clip: Clip, index: FrameIndex, rows: NDArray[np.int64], video: VideoConfig) -> NDArray[np.int64]:
    """Those of `rows`, the clip's frames, that are to be decoded: int64 [T], or fewer.

    Raises:
        VideoError: There are fewer than `video.frames`, and `video.short` is `quarantine`.
    """
    count = len(rows)
    if count < video.frames:
        if video.short == "quarantine":
            raise VideoError(f"clip {clip.clip_id} has {counted(count, 'frame')}; video.frames requires {video.frames}")
        if video.short == "zeros":
            return rows
        return rows[uniform_indices(count, video.frames)]
    starts_s = index.starts_s[rows]
    if has_varying_rate(starts_s):
        end_s = float(index.starts_s[rows[-1] + 1]) if rows[-1] + 1 < len(index.pts) else index.end_s
        return rows[uniform_by_time(starts_s, end_s, video.frames)]
    return rows[uniform_indices(count, video.frames)]
