"""One video file: the times of its frames, and the pixels of selected frames.

Frames are decoded from the key frame before them and must come out one by one as the index says; the first must be a
key frame for the decoder too, whatever the file's marks say. Where that fails, decoding starts from earlier key frames,
and in the end from the file's first packet. So a wrong frame count or duration in the header, a wrong mark, a damaged
frame or an inexact seek can never return one frame in place of another, or a picture that the video never shows.

At first only the packets that the wanted frames need are decoded: frames that nothing refers to are left out, and the
decoder is flushed after the last wanted packet. If that gives anything unexpected, every packet is decoded as above.
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import dropwhile
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
from numpy.typing import NDArray

from egopatch.extract.children.limits import reading_through
from egopatch.extract.video.indexing.cache import FileVersion, VideoCache, version_of
from egopatch.extract.video.indexing.index import (
    FrameIndex,
    LogLine,
    VideoError,
    checksum,
    decode,
    index_of_frames,
    index_of_packets,
    pts_of,
)
from egopatch.extract.video.nvdec import refusal, uses_gpu
from egopatch.extract.video.opening import cause_of, opened, require_content, video_stream
from egopatch.extract.video.orientation import Upright
from egopatch.extract.video.planes import Planes

KEPT_BYTES = 32 * 2**20  # smaller files are read only once, for the index and for the decoder
Shrink = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
Found = dict[int, Any]  # row -> its frame, finished


class UnclearPackets(VideoError):
    """The decoder shows frames that differ from what the packets promise; `VideoFile.decode_through` indexes them."""


@dataclass(frozen=True)
class _Stop:
    """Where decoding ceased to follow the index: the row, and whether the decoder failed there."""

    row: int
    is_damaged: bool


class VideoFile:
    """An open video; see `open_video`.

    Attributes:
        path: Path of the video.
        index: Frame index of the video.
    """

    def __init__(
        self,
        path: Path,
        container: "av.container.InputContainer",
        logged: Sequence[LogLine],
        version: FileVersion,
        cache: VideoCache,
        on_gpu: bool,
    ) -> None:
        self.path = path
        self._upright = Upright(path)
        self._on_gpu = on_gpu
        self._container = container
        self._stream = video_stream(path, container)
        self._logged = logged
        self._version = version
        self._cache = cache
        self._finish: Callable[[av.VideoFrame], Any] = self._upright
        self._packets: list[av.Packet[av.VideoStream]] = []
        index = None
        if not cache.has("index of frames", version):
            index = cache.find("index of packets", version, self._read_packets)
        self.index = index or self.decode_through()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a frame as it is stored, by the file's header."""
        return self._stream.codec_context.width, self._stream.codec_context.height

    def decode_through(self) -> FrameIndex:
        """Replace the index of packets by an index of the frames that the decoder shows."""
        self.index = self._cache.find("index of frames", self._version, self._read_frames)
        return self.index

    def pixels(self, rows: NDArray[np.int64], shrink: Shrink | None = None) -> list[NDArray[np.uint8]]:
        """The upright frames at `rows` of the index, each uint8 [H, W, 3]; a row may occur twice.

        Args:
            rows: Rows of the index.
            shrink: Makes each frame smaller as soon as it is decoded.

        Raises:
            UnclearPackets: The packets did not tell which frames the video shows.
            VideoError: One of the frames is damaged.
        """

        def shrunk(frame: "av.VideoFrame") -> NDArray[np.uint8]:
            pixels = self._upright(frame)
            return shrink(pixels) if shrink else pixels

        return self._decoded(rows, shrunk)

    def planes(self, rows: NDArray[np.int64]) -> list[Planes | NDArray[np.uint8]]:
        """As `pixels`, but upright frames stay as they were decoded if `extract.video.planes` can convert them."""
        return self._decoded(rows, self._upright.planes)

    def _decoded(self, rows: NDArray[np.int64], finish: Callable[["av.VideoFrame"], Any]) -> list[Any]:
        for row in rows[self.index.damaged[rows]].tolist():
            raise self._damaged(row)
        if self._on_gpu:
            self._require_gpu_decoding()
        self._finish = finish
        found: Found = {}
        missing = np.unique(rows)
        while len(missing):
            keys = self.index.keys_before(missing)
            group = missing[keys == keys[0]]
            stop = self._decode_from(int(keys[0]), group, found) if keys[0] >= 0 else _Stop(0, False)
            if stop is not None:
                # If one mark of a key frame is wrong, others are too: no further seeks up to the last row.
                self._decode_from_earlier(int(keys[0]), missing, found, stop)
            missing = np.array([row for row in missing.tolist() if row not in found], np.int64)
        return [found[row] for row in rows.tolist()]

    def _decode_from_earlier(self, key: int, rows: NDArray[np.int64], found: Found, stop: _Stop) -> None:
        """Add the frames at `rows` to `found`, from a key frame before `key`; decoding from `key` ended at `stop`."""
        back = 1
        while back <= key:
            again = self._decode_from(key - back, rows, found)
            if again is None:
                return
            if again == stop and stop.is_damaged:
                raise self._damaged(stop.row)
            stop, back = again, 2 * back + 1
        with opened(self.path, self._on_gpu, self._logged) as container:
            packets = container.demux(video_stream(self.path, container))
            last = self._decode(packets, 0, rows, found)
        if last is None:
            return
        if last.is_damaged or self.index.sums is not None:
            raise self._damaged(last.row)
        raise UnclearPackets(f"video {self.path} shows different frames than its packets announce; convert it to mp4")

    def _decode_from(self, key: int, rows: NDArray[np.int64], found: Found) -> _Stop | None:
        """As `_decode`, from a key frame of the index."""
        pts, dts, row = self.index.keys[key].tolist()
        if self.index.disposable is not None and self._decode_needed(pts, dts, row, rows, found):
            return None
        # The file's first packet needs no other one, even if its frame is not marked or not shown.
        is_first = pts == self.index.first_pts
        return self._decode(self._packets_from(pts, dts), row if is_first else None, rows, found)

    def _packets_from(self, pts: int, dts: int) -> Iterator["av.Packet[av.VideoStream]"]:
        """The packets from a key frame's on; none if the container cannot find it."""
        if self._packets:
            self._stream.codec_context.flush_buffers()  # as a seek does
            yield from dropwhile(lambda packet: not packet.is_keyframe or packet.pts != pts, self._packets)
            return
        # Some containers seek by dts, and not all can seek to the key frame itself.
        for target in dict.fromkeys((pts, dts, int(self.index.keys[0, 1]))):
            self._container.seek(target, stream=self._stream)
            started = False
            for packet in self._container.demux(self._stream):
                started = started or (packet.is_keyframe and packet.pts == pts)
                if started:
                    yield packet
                elif packet.dts is not None and packet.dts > dts:
                    break
            if started:
                return

    def _decode_needed(self, pts: int, dts: int, first_row: int, rows: NDArray[np.int64], found: Found) -> bool:
        """Add the frames at `rows` to `found`, decoded from a key frame without the packets that they do not need.

        Returns:
            Whether each packet led to its frame, in the order of the index. If not, `found` may have some frames.
        """
        index, is_first = self.index, pts == self.index.first_pts
        missing, sent, last = set(rows.tolist()), list[int](), -1
        complaints = len(self._logged)
        for row, packet in self._needed(self._packets_from(pts, dts), rows):
            if row is not None and row >= first_row:
                heappush(sent, row)
            frames = decode(packet)
            # What a decoder substitutes for missing data depends on all packets that it was given.
            if frames is None or len(self._logged) > complaints:
                return False
            for frame in frames:
                # Fields may have packets of their own, which the index takes for frames.
                if frame.is_corrupt or frame.interlaced_frame:
                    return False
                if last < 0 and pts_of(frame) < pts:
                    continue  # depends on something before the key frame, or an edit list removes it
                shown = index.row_of(frame.pts)
                if not sent or shown != heappop(sent) or shown <= last:
                    return False
                if last < 0 and (shown != first_row or not (is_first or frame.key_frame)):
                    return False
                last = shown
                if shown in missing:
                    found[shown] = self._finish(frame)
                    missing.remove(shown)
                if not missing:
                    return True
        return False

    def _needed(
        self, packets: Iterable["av.Packet[av.VideoStream]"], rows: NDArray[np.int64]
    ) -> Iterator[tuple[int | None, "av.Packet[av.VideoStream]"]]:
        """Rows and packets that the frames at `rows` need, and a last packet that makes the decoder return them all."""
        index, unsent = self.index, set(rows.tolist())
        disposable = np.zeros(len(index.pts), bool) if index.disposable is None else index.disposable
        for packet in packets:
            row = index.row_of(packet.pts)
            if row is None or row in unsent or not disposable[row]:
                yield row, packet
                unsent.discard(row)
            if not unsent:
                end: av.Packet[av.VideoStream] = av.Packet()
                end.stream = self._stream
                yield None, end
                return

    def _decode(
        self,
        packets: Iterable["av.Packet[av.VideoStream]"],
        first_row: int | None,
        rows: NDArray[np.int64],
        found: Found,
    ) -> _Stop | None:
        """Decode `packets`, compare their frames with the index, and add those at `rows` to `found`.

        Args:
            packets: Packets from the file's first, or from one that is marked as a key frame.
            first_row: Row of the first frame, if `packets` start with the file's first. None: decoding starts at the
                first frame that the decoder calls a key frame too.
            rows: Rows to add, ascending.
            found: Frames of each row.

        Returns:
            Where decoding was not exact; None if all rows were added.
        """
        index, wanted = self.index, set(rows.tolist())
        key_rows = {} if first_row is not None else dict(index.keys[:, [0, 2]].tolist())
        leading = index.leading or 0
        row: int | None = None
        for packet in packets:
            frames = decode(packet)
            if frames is None and row is not None and index.sums is None:
                return _Stop(row, is_damaged=True)
            for frame in frames or ():
                pts = pts_of(frame)
                if row is None and first_row is None:
                    row = key_rows.get(pts) if frame.key_frame else None
                    if row is None and pts < index.pts[rows[0]]:
                        continue
                    if row is None or row > rows[0]:
                        return _Stop(int(rows[0]), is_damaged=False)
                elif row is None:
                    # Frames that depend on something that was cut off, or that an edit list removes.
                    if leading > 0 or (index.leading is None and pts < index.pts[first_row]):
                        leading -= 1
                        continue
                    row = first_row
                assert row is not None
                if pts != index.pts[row]:
                    return _Stop(row, is_damaged=False)
                if frame.is_corrupt and not index.damaged[row]:
                    return _Stop(row, is_damaged=True)
                if row in wanted:
                    if index.sums is not None and checksum(frame) != index.sums[row]:
                        return _Stop(row, is_damaged=False)
                    found[row] = self._finish(frame)
                if row == rows[-1]:
                    return None
                row += 1
        return _Stop(int(rows[0]) if row is None else row, is_damaged=False)

    def _require_gpu_decoding(self) -> None:
        """Decode the first key frame: a GPU that does not support the codec or the format refuses every frame."""
        codec = self._stream.codec_context
        if self.index.sums is not None:
            raise refusal(self.path, "its packets do not hold one frame each")
        if not uses_gpu(self._stream):
            raise refusal(self.path, f"FFmpeg has no {codec.name} decoder that uses the GPU")
        pts, dts, row = self.index.keys[0].tolist()
        for _, packet in self._needed(self._packets_from(pts, dts), np.array([row])):
            frames = decode(packet)
            if frames:
                return
        profile = f" {codec.profile}" if codec.profile else ""
        raise refusal(self.path, f"the GPU does not decode {codec.name}{profile} of {codec.width}x{codec.height}")

    def _damaged(self, row: int) -> VideoError:
        index = self.index
        reason = "that frame is damaged or has a wrong time"
        if index.damaged[row]:
            before = np.flatnonzero(~index.damaged[:row])
            after = np.flatnonzero(~index.damaged[row:])
            start_s = index.starts_s[before[-1] + 1 if len(before) else 0]
            end_s = index.starts_s[row + after[0]] if len(after) else index.end_s
            reason = f"the file is damaged from {start_s:.3f} to {end_s:.3f} s"
        cause = f" ({self._logged[-1][2].strip()})" if self._logged else ""
        if self._on_gpu and not index.damaged[row]:  # the GPU's decoder may be at fault
            return refusal(self.path, f"the frame at {index.starts_s[row]:.3f} s is damaged or has a wrong time{cause}")
        return VideoError(
            f"video {self.path} cannot be decoded at {index.starts_s[row]:.3f} s: {reason}{cause}; download it again,"
            " or convert it to mp4"
        )

    def _read_packets(self) -> FrameIndex | None:
        with reading_through(self._version[1]):
            index = index_of_packets(self.path, self._container, self._stream, self._demuxed(), self._logged)
        if index is None or index.damage or index.damaged.any():
            self._packets.clear()
        return index

    def _demuxed(self) -> Iterator["av.Packet[av.VideoStream]"]:
        for packet in self._container.demux(self._stream):
            if self._version[1] <= KEPT_BYTES:
                self._packets.append(packet)
            yield packet

    def _read_frames(self) -> FrameIndex:
        # Opened again: not every container can seek back to its first packet.
        with reading_through(self._version[1]), opened(self.path) as container:
            return index_of_frames(self.path, container, video_stream(self.path, container), self._logged)


@contextmanager
def open_video(path: Path, cache: VideoCache | None = None, on_gpu: bool = False) -> Iterator[VideoFile]:
    """Open `path` while the block runs. FFmpeg's errors in the block become `VideoError` too.

    Args:
        path: Path of the video.
        cache: Keeps the video's index.
        on_gpu: Whether a GPU decodes; see `extract.video.nvdec`.

    Raises:
        VideoError: The file is missing, unreadable or empty, or has no frame that can be decoded.
        MemoryError: FFmpeg ran out of memory.
    """
    require_content(path)
    # Read before the file is opened: if it is replaced meanwhile, its index is not stored under the new version.
    version = version_of(path)
    level, terse = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)  # otherwise nothing is logged
    av.logging.set_skip_repeated(False)  # otherwise a second damaged file logs nothing
    on_cpu = True
    try:
        with av.logging.Capture() as logged, opened(path, on_gpu, logged) as container:
            file = VideoFile(path, container, logged, version, cache or VideoCache(), on_gpu)
            on_cpu = not on_gpu
            yield file
    except av.FFmpegError as error:
        cause = cause_of(error, logged)
        if not on_cpu:  # a lack of memory too, which may be the GPU's, or of its decoder's surfaces
            raise refusal(path, cause) from error
        if isinstance(error, av.error.MemoryError):
            raise MemoryError(error.strerror) from error
        # Something that this FFmpeg cannot do, such as colours that it does not turn into RGB.
        is_unknown = isinstance(error, av.error.PatchWelcomeError) or error.errno == errno.EOPNOTSUPP
        remedy = "convert it to H.264 with the colours of BT.709" if is_unknown else "download it again"
        raise VideoError(f"video {path} cannot be decoded: {cause}; {remedy}") from error
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(terse)
