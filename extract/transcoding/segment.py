"""The copy of one clip: every frame that the clip shows, at its time, but smaller and with a key frame each second."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.container import UnclearPackets, VideoFile, open_video
from egopatch.extract.video.frames import has_varying_rate, rows_within
from egopatch.extract.video.indexing.cache import VideoCache, version_of
from egopatch.extract.video.indexing.index import VideoError
from egopatch.extract.video.opening import require_content
from egopatch.features.common.units import counted
from egopatch.features.io.files import replacing

SHORT_SIDE = 288
KEY_FRAME_S = 1.0
UNITS_PER_S = 90_000
# One thread per encoder, because every core runs its own process; key frames come only where they are requested.
X264 = {"crf": "18", "preset": "veryfast", "forced-idr": "1", "g": "100000", "sc_threshold": "0", "threads": "1"}
SETTINGS = f"short side {SHORT_SIDE}, a key frame every {KEY_FRAME_S:g} s, x264 {X264['preset']} crf {X264['crf']}"
MOST_ROWS = 512  # small frames in memory at a time: 230 MB
SAME_TIME_S = 1e-3
SAME_MEAN = 4.0  # difference in mean level, 0 to 255; another frame of a moving picture usually differs by more


@dataclass(frozen=True)
class Segment:
    """A copy that was written and verified.

    Attributes:
        clip_id: The clip.
        frames: Number of its frames.
        seconds: Its duration.
        size: Bytes of the file.
        clip_end_s: End of the clip in the copy's time, if it lies beyond the end of the video and so of the copy.
    """

    clip_id: str
    frames: int
    seconds: float
    size: int
    clip_end_s: float | None = None


def write_segment(clip: Clip, video: VideoConfig, cache: VideoCache | None = None, *, folder: Path) -> Segment:
    """Write the copy, verify it, and only then give it its name, `folder/CLIP_ID.mp4`.

    Raises:
        VideoError: As `extract.video.frames.read_frames`; or the copy does not hold the clip's frames.
    """
    target = folder / f"{clip.clip_id}.mp4"
    require_content(clip.video)
    before = version_of(clip.video)
    with open_video(clip.video, cache) as file, replacing(target) as temporary:
        try:
            times_s, means = _write(clip, file, temporary)
        except UnclearPackets:
            file.decode_through()
            times_s, means = _write(clip, file, temporary)
        _verify(temporary, times_s, means)
        if before != version_of(clip.video):
            raise VideoError(f"video {clip.video} changed while it was being read; run the same command again")
        size = temporary.stat().st_size
        first_s = float(file.index.starts_s[rows_within(clip, file.index)[0]])
        end_s = None if clip.end_s is None or clip.end_s <= file.index.end_s else clip.end_s - first_s
    return Segment(clip.clip_id, len(times_s), float(times_s[-1]), size, end_s)


def _write(clip: Clip, file: VideoFile, path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Encode the clip's frames; returns their times [count] from the first one, and their mean colours [count, 3]."""
    index = file.index
    rows = rows_within(clip, index)
    times_s = index.starts_s[rows] - index.starts_s[rows[0]]
    end_s = index.starts_s[rows[-1] + 1] if rows[-1] + 1 < len(index.pts) else index.end_s
    units = np.round(np.append(times_s, end_s - index.starts_s[rows[0]]) * UNITS_PER_S).astype(int).tolist()
    durations = {start: end - start for start, end in pairwise(units)}
    means = np.empty((len(rows), 3))
    rate = Fraction(1 / max(float(np.median(np.diff(times_s))), 1e-3)).limit_denominator(1000) if len(rows) > 1 else 1
    with av.open(str(path), "w", format="mp4") as out:
        # With B-frames, mp4 does not keep the end of the last frame, which matters if the rate varies.
        options = X264 | {"bf": "0"} if has_varying_rate(times_s) else X264
        stream = out.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, UNITS_PER_S)
        second = -1
        for number, pixels in enumerate(_small(file, rows)):
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
            if pixels.shape[:2] != (stream.height, stream.width):
                raise VideoError(
                    f"video {clip.video} changes its size within clip {clip.clip_id}; use the original video"
                )
            means[number] = pixels.mean((0, 1))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = units[number], stream.codec_context.time_base
            # Times may be a little short of a second.
            if (now := math.floor(times_s[number] / KEY_FRAME_S + SAME_TIME_S)) > second:
                frame.pict_type, second = PictureType.I, now
            _mux(out, stream.encode(frame), durations)
        _mux(out, stream.encode(), durations)
    return times_s, means


def _mux(
    out: "av.container.OutputContainer", packets: "list[av.Packet[av.VideoStream]]", durations: dict[int, int]
) -> None:
    for packet in packets:
        packet.duration = durations[packet.pts]
        out.mux(packet)


def _small(file: VideoFile, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """The frames at `rows`, which are consecutive, with an even width and height and a short side of `SHORT_SIDE`."""
    start = 0
    while start < len(rows):
        # Pieces end at a key frame if possible, so that few groups are decoded from their start twice.
        keys = np.flatnonzero(np.isin(rows[start + 1 : start + MOST_ROWS], file.index.keys[:, 2]))
        end = start + 1 + int(keys[-1]) if len(keys) and start + MOST_ROWS < len(rows) else start + MOST_ROWS
        yield from file.pixels(rows[start:end], _shrunk)
        start = end


def _shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    scale = min(SHORT_SIDE / min(height, width), 1.0)
    small = [max(round(extent * scale / 2) * 2, 2) for extent in (width, height)]
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(*small, format="rgb24", interpolation="AREA", threads=1).to_ndarray()


def _verify(path: Path, times_s: NDArray[np.float64], means: NDArray[np.float64]) -> None:
    """Check number, times and mean colours of the copy's frames against the source, and its key frames."""
    with open_video(path) as copy:
        index = copy.index
        if len(index.pts) != len(times_s) or index.damage:
            raise _wrong(
                path,
                f"it has {counted(len(index.pts), 'frame')}, "
                f"expected {len(times_s)}{index.damage and '; '}{index.damage}",
            )
        if np.abs(index.starts_s - index.starts_s[0] - times_s).max() > SAME_TIME_S:
            raise _wrong(path, "its frames have different times")
        longest_s = np.diff(times_s).max(initial=0.0)
        if (
            np.diff([*index.starts_s[index.keys[:, 2]], index.starts_s[-1]]).max()
            > KEY_FRAME_S + longest_s + SAME_TIME_S
        ):
            raise _wrong(path, f"its key frames are over {KEY_FRAME_S:g} s apart")
        rows = np.arange(len(index.pts))
        for start in range(0, len(rows), MOST_ROWS):
            for row, pixels in enumerate(copy.pixels(rows[start : start + MOST_ROWS]), start):
                if np.abs(pixels.mean((0, 1)) - means[row]).max() > SAME_MEAN:
                    raise _wrong(path, f"its frame at {times_s[row]:.3f} s has different colours")


def _wrong(path: Path, what: str) -> VideoError:
    return VideoError(f"the copy {path} cannot be used: {what}; use the original video, and report this as a bug")
