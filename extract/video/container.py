"""A video file: which frames it shows and when, and the pixels of some of them.

Containers are read packet by packet for the times of the frames, which costs no decoding. Frames are then decoded from
the keyframe before them and have to come out one by one with those times; anything else is an error. So a header with a
wrong count or duration, a damaged frame, or a seek that lands elsewhere cannot put one frame in another's place.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import av.logging
import numpy as np
from numpy.typing import NDArray

LogLine = tuple[int, str, str]  # level, part of FFmpeg, message
FileVersion = tuple[Path, int, int]  # bytes, time of the last change in nanoseconds


class VideoError(ValueError):
    """A clip cannot be decoded as asked; the message names the file and why."""


@dataclass(frozen=True)
class FrameIndex:
    """The frames that a video shows, in the order in which it does.

    Attributes:
        pts: int64 [count], time of each in the stream's own unit.
        starts_s: float64 [count], when each appears, in seconds of the file's timeline as players show it.
        end_s: when the last one disappears.
        keys: int64 [count], pts of the keyframe from which each is decoded.
        damage: what ended the file early, or nothing.
    """

    pts: NDArray[np.int64]
    starts_s: NDArray[np.float64]
    end_s: float
    keys: NDArray[np.int64]
    damage: str


class FrameIndexes:
    """Indexes of the videos read last, so that the clips of a long video read it packet by packet only once.

    Args:
        size: videos to remember.
    """

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._known: OrderedDict[FileVersion, FrameIndex] = OrderedDict()

    def find(self, version: FileVersion) -> FrameIndex | None:
        """The index of that version of a file, where it is remembered."""
        if version in self._known:
            self._known.move_to_end(version)
        return self._known.get(version)

    def keep(self, version: FileVersion, index: FrameIndex) -> None:
        """Remember an index, and forget the one that was used least lately."""
        self._known[version] = index
        if len(self._known) > self._size:
            self._known.popitem(last=False)


class VideoFile:
    """An open video; make one with `open_video`.

    Attributes:
        index: its frames.
    """

    def __init__(
        self, path: Path, container: "av.container.InputContainer", logged: Sequence[LogLine], index: FrameIndex | None
    ) -> None:
        self._path = path
        self._container = container
        if not container.streams.video:
            kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
            raise VideoError(
                f"video {path} cannot be decoded: it holds {kinds} and no picture track; expected a whole video file"
            )
        self._stream = container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # every core has a decoder of its own
        self.index = self._read_index(logged) if index is None else index

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames `rows` of the index, upright: uint8 [len(rows), H, W, 3]; a row may come twice.

        Raises:
            VideoError: one of them is damaged.
        """
        found: dict[int, NDArray[np.uint8]] = {}
        for key in np.unique(self.index.keys[rows]).tolist():
            wanted = set(rows[self.index.keys[rows] == key].tolist())
            row = int(np.searchsorted(self.index.pts, key))
            for frame in self._frames_from(key):
                if frame.pts < self.index.pts[row]:
                    continue  # of the group before, or left out by an edit list
                if frame.is_corrupt or frame.pts != self.index.pts[row]:
                    break
                if row in wanted:
                    found[row] = self._upright(frame)
                row += 1
                if row > max(wanted):
                    break
            if row <= max(wanted):
                raise VideoError(
                    f"video {self._path} cannot be decoded at {self.index.starts_s[row]:.3f} s: that frame is damaged"
                    " or has another's time; fetch it again, or convert it to mp4"
                )
        return np.stack([found[row] for row in rows.tolist()])

    def _read_index(self, logged: Sequence[LogLine]) -> FrameIndex:
        shown: list[tuple[int, int, int]] = []  # pts, duration, pts of its keyframe
        keyframes: list[int] = []
        damage = ""
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    damage = "a packet is cut off"
                elif packet.size and packet.pts is None:
                    raise VideoError(f"video {self._path} has a frame without a time; convert it to mp4")
                elif packet.size:
                    if packet.is_keyframe:
                        keyframes.append(packet.pts)
                    # A frame may follow one keyframe and be shown before it, so that it needs the keyframe before.
                    # Without any it does not decode, as at the start of a file that was cut out of another.
                    key = next((pts for pts in reversed(keyframes) if pts <= packet.pts), None)
                    # What an edit list leaves out is there to decode the rest.
                    if key is not None and not packet.is_discard:
                        shown.append((packet.pts, packet.duration or 0, key))
        except av.error.MemoryError:
            raise
        except av.FFmpegError as error:
            damage = str(error.strerror)
        # The decoder also logs, about single frames; only the reader of the container says that the file ends early.
        complaints = [message.strip() for _, part, message in logged if part == self._container.format.name]
        damage = "; ".join(complaints[:1]) or damage
        if not shown:
            raise VideoError(
                f"video {self._path} has no frame that can be decoded ({damage or 'no keyframe'}); fetch it again"
            )
        pts, durations, keys = np.array(sorted(shown), np.int64).T
        unit_s = float(self._stream.time_base)
        # Containers count in microseconds at best.
        starts_s = np.round(pts * unit_s - (self._container.start_time or 0) / av.time_base, 6)
        last_s = float(durations[-1]) * unit_s or (float(np.median(np.diff(starts_s))) if len(pts) > 1 else 0.0)
        return FrameIndex(pts, starts_s, float(starts_s[-1]) + last_s, keys, damage)

    def _frames_from(self, key: int) -> Iterator["av.VideoFrame"]:
        """What the decoder gives from the keyframe at `key` on."""
        # Not every container can seek to the place itself; the first frame of all is the way round.
        for place in (key, int(self.index.keys[0]), 0):
            self._container.seek(place, stream=self._stream)
            started = False
            for packet in self._container.demux(self._stream):
                started = started or (packet.is_keyframe and packet.pts == key)
                if started:
                    yield from packet.decode()
            if started:
                return

    def _upright(self, frame: "av.VideoFrame") -> NDArray[np.uint8]:
        """[H, W, 3], turned as the file's display matrix asks."""
        pixels = frame.to_ndarray(format="rgb24", threads=1)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return pixels
        # (x, y) is shown at (a x + c y, b x + d y); 16.16 fixed point.
        a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist()
        if (a or d) and (b or c):
            raise VideoError(f"video {self._path} is to be shown at a slant; expected a turn by 90, 180 or 270 degrees")
        if b or c:
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@contextmanager
def open_video(path: Path, indexes: FrameIndexes | None = None) -> Iterator[VideoFile]:
    """Open `path` while the block runs. FFmpeg's errors in the block become `VideoError` too.

    Args:
        path: of the video.
        indexes: where to look for its index first, and to leave it.

    Raises:
        VideoError: the file is missing, not readable, empty, or has no frame that can be decoded.
        MemoryError: FFmpeg was refused memory.
    """
    _require_content(path)
    # Before it is opened: of a file that is replaced meanwhile, no index is taken for that of the new one.
    version = _version(path)
    level, terse = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)  # or nothing is logged at all
    av.logging.set_skip_repeated(False)  # or a second damaged file would be passed over in silence
    try:
        with av.logging.Capture() as logged, av.open(str(path)) as container:
            known = indexes.find(version) if indexes else None
            file = VideoFile(path, container, logged, known)
            if indexes and known is None:
                indexes.keep(version, file.index)
            yield file
    except av.error.MemoryError as error:
        raise MemoryError(error.strerror) from error
    except av.FFmpegError as error:
        cause = f": {logged[-1][2].strip()}" if logged else ""
        raise VideoError(f"video {path} cannot be decoded: {error.strerror}{cause}; fetch it again") from error
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(terse)


def _version(path: Path) -> FileVersion:
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


def _require_content(path: Path) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise VideoError(f"video {path} does not exist; put the file there or correct the annotation") from None
    except OSError as error:
        raise VideoError(f"video {path} cannot be read: {error.strerror}; expected a file to read") from error
    if empty:
        raise VideoError(f"video {path} is empty (0 bytes); fetch it again")
