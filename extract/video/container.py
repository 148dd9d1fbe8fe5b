"""One video file: the times of its frames, and the pixels of selected frames.

The times come from reading the container packet by packet, without decoding. Frames are then decoded from the keyframe
before them and must come out one by one with exactly these times; anything else is an error. So a wrong frame count or
duration in the header, a damaged frame or an inexact seek can never return one frame in place of another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import av.logging
import numpy as np
from numpy.typing import NDArray

from egopatch.extract.video.limits import reading_through
from egopatch.extract.video.once import FileVersion, OncePerVideo, version_of

LogLine = tuple[int, str, str]  # level, part of FFmpeg, message


class VideoError(ValueError):
    """A clip cannot be decoded as configured; the message names the file and the cause."""


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a video, in display order.

    Attributes:
        pts: int64 [count], time of each frame in the stream's own unit.
        starts_s: float64 [count], time at which each frame appears, in seconds of the file's timeline in a player.
        end_s: Time at which the last frame disappears.
        keys: int64 [count], pts of the keyframe from which each frame is decoded.
        damage: Damage that ended the file early; empty if the file is whole.
    """

    pts: NDArray[np.int64]
    starts_s: NDArray[np.float64]
    end_s: float
    keys: NDArray[np.int64]
    damage: str


class VideoFile:
    """An open video; see `open_video`.

    Attributes:
        index: Frame index of the video.
    """

    def __init__(
        self,
        path: Path,
        container: "av.container.InputContainer",
        logged: Sequence[LogLine],
        version: FileVersion,
        once: OncePerVideo,
    ) -> None:
        self._path = path
        self._container = container
        if not container.streams.video:
            kinds = ", ".join(stream.type for stream in container.streams) or "none"
            raise VideoError(
                f"video {path} cannot be decoded: it has no picture track (tracks: {kinds}); expected a complete video"
            )
        self._stream = container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # every core runs its own decoder

        def read_index() -> FrameIndex:
            with reading_through(version[1]):
                return self._read_index(logged)

        self.index = once.find("index", version, read_index)

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The upright frames at `rows` of the index: uint8 [len(rows), H, W, 3]; a row may occur twice.

        Raises:
            VideoError: One of the frames is damaged.
        """
        found: dict[int, NDArray[np.uint8]] = {}
        for key in np.unique(self.index.keys[rows]).tolist():
            requested = set(rows[self.index.keys[rows] == key].tolist())
            row = int(np.searchsorted(self.index.pts, key))
            for frame in self._frames_from(key):
                if frame.pts < self.index.pts[row]:
                    continue  # from the group before, or removed by an edit list
                if frame.is_corrupt or frame.pts != self.index.pts[row]:
                    break
                if row in requested:
                    found[row] = self._upright(frame)
                row += 1
                if row > max(requested):
                    break
            if row <= max(requested):
                raise VideoError(
                    f"video {self._path} cannot be decoded at {self.index.starts_s[row]:.3f} s: that frame is damaged"
                    " or has a wrong time; download it again, or convert it to mp4"
                )
        return np.stack([found[row] for row in rows.tolist()])

    def _read_index(self, logged: Sequence[LogLine]) -> FrameIndex:
        shown: list[tuple[int, int, int]] = []  # pts, duration, pts of its keyframe
        keyframes: list[int] = []
        damage = ""
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    damage = "a packet is truncated"
                elif packet.size and packet.pts is None:
                    raise VideoError(f"video {self._path} has a frame without a time; convert it to mp4")
                elif packet.size:
                    if packet.is_keyframe:
                        keyframes.append(packet.pts)
                    # A frame that follows a keyframe but is shown before it needs the previous keyframe. Without one
                    # it cannot be decoded, as at the start of a file that was cut from another one.
                    key = next((pts for pts in reversed(keyframes) if pts <= packet.pts), None)
                    # Frames that an edit list removes are only there to decode others.
                    if key is not None and not packet.is_discard:
                        shown.append((packet.pts, packet.duration or 0, key))
        except av.error.MemoryError:
            raise
        except av.FFmpegError as error:
            damage = str(error.strerror)
        # The decoder logs about single frames too; only the container's reader reports that the file ends early.
        complaints = [message.strip() for _, part, message in logged if part == self._container.format.name]
        damage = "; ".join(complaints[:1]) or damage
        if not shown:
            raise VideoError(
                f"video {self._path} has no frame that can be decoded ({damage or 'no keyframe'}); download it again"
            )
        pts, durations, keys = np.array(sorted(shown), np.int64).T
        unit_s = float(self._stream.time_base)
        # Containers count in microseconds at best.
        starts_s = np.round(pts * unit_s - (self._container.start_time or 0) / av.time_base, 6)
        last_s = float(durations[-1]) * unit_s or (float(np.median(np.diff(starts_s))) if len(pts) > 1 else 0.0)
        return FrameIndex(pts, starts_s, float(starts_s[-1]) + last_s, keys, damage)

    def _frames_from(self, key: int) -> Iterator["av.VideoFrame"]:
        """The decoder's frames from the keyframe at `key` on."""
        # Not every container can seek to the keyframe itself; the first frame of the file is the fallback.
        for target in (key, int(self.index.keys[0]), 0):
            self._container.seek(target, stream=self._stream)
            started = False
            for packet in self._container.demux(self._stream):
                started = started or (packet.is_keyframe and packet.pts == key)
                if started:
                    yield from packet.decode()
            if started:
                return

    def _upright(self, frame: "av.VideoFrame") -> NDArray[np.uint8]:
        """[H, W, 3], rotated by the file's display matrix."""
        pixels = frame.to_ndarray(format="rgb24", threads=1)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return pixels
        # (x, y) is shown at (a x + c y, b x + d y); 16.16 fixed point.
        a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist()
        if (a or d) and (b or c):
            raise VideoError(f"video {self._path} is rotated by an odd angle; expected 0, 90, 180 or 270 degrees")
        if b or c:
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@contextmanager
def open_video(path: Path, once: OncePerVideo | None = None) -> Iterator[VideoFile]:
    """Open `path` while the block runs. FFmpeg's errors in the block become `VideoError` too.

    Args:
        path: Path of the video.
        once: Remembers the video's index.

    Raises:
        VideoError: The file is missing, unreadable or empty, or has no frame that can be decoded.
        MemoryError: FFmpeg ran out of memory.
    """
    _require_content(path)
    # Read before the file is opened: if it is replaced meanwhile, its index is not stored under the new version.
    version = version_of(path)
    level, terse = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)  # otherwise nothing is logged
    av.logging.set_skip_repeated(False)  # otherwise a second damaged file logs nothing
    try:
        with av.logging.Capture() as logged, av.open(str(path)) as container:
            yield VideoFile(path, container, logged, version, once or OncePerVideo())
    except av.error.MemoryError as error:
        raise MemoryError(error.strerror) from error
    except av.FFmpegError as error:
        cause = f": {logged[-1][2].strip()}" if logged else ""
        raise VideoError(f"video {path} cannot be decoded: {error.strerror}{cause}; download it again") from error
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(terse)


def _require_content(path: Path) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise VideoError(f"video {path} does not exist; put the file there or correct the annotation") from None
    except OSError as error:
        raise VideoError(f"video {path} cannot be read: {error.strerror}; expected a readable file") from error
    if empty:
        raise VideoError(f"video {path} is empty (0 bytes); download it again")
