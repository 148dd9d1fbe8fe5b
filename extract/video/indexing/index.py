"""The index of a video: which frames it shows, when, and the key frames from which they can be decoded.

For nearly every file the packets reveal it without decoding (`index_of_packets`). If they have no times, or wrong ones,
or do not hold one frame each (fields, packed B-frames), every frame is decoded once (`index_of_frames`).
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from egopatch.extract.video.indexing.declared_size import missing_bytes
from egopatch.extract.video.indexing.disposable import ALWAYS_DECODED, layer_reader
from egopatch.features.common.units import counted

LogLine = tuple[int, str, str]  # level, part of FFmpeg, message

NO_PTS = np.iinfo(np.int64).min  # pts of a frame whose packet has no time
MAX_REORDERED = 17  # frames of H.264 and HEVC that may be out of order at a time
VP8_SHOWN = 0x10  # bit of a packet's first byte


class VideoError(ValueError):
    """A clip cannot be decoded as configured; the message names the file and the cause."""


@dataclass(frozen=True)
class FrameIndex:
    """The frames that a video shows, in this order.

    Attributes:
        pts: int64 [count], time that the decoder gives with each frame, in the stream's own unit.
        starts_s: float64 [count], time at which each frame appears, in seconds of the file's timeline in a player.
        end_s: Time at which the last frame disappears.
        keys: int64 [keys, 3], the frames that are marked as key frames: pts, dts, and the first row shown from there.
        first_pts: pts of the file's first packet; the decoder needs nothing before it.
        damaged: bool [count], whether a frame depends on damaged data, or is shown until a frame that was lost.
        damage: Damage that ended the file early; empty if the file is whole.
        disposable: bool [count], whether no other frame refers to a frame; None if that is not known.
        leading: Number of frames that the decoder returns before the first row; None: all that have an earlier pts.
        sums: uint32 [count], checksums of the frames as decoded from the first packet; None if none was decoded.
    """

    pts: NDArray[np.int64]
    starts_s: NDArray[np.float64]
    end_s: float
    keys: NDArray[np.int64]
    first_pts: int
    damaged: NDArray[np.bool_]
    damage: str
    disposable: NDArray[np.bool_] | None = None
    leading: int | None = None
    sums: NDArray[np.uint32] | None = None

    def keys_before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(rows)], position in `keys` of the last key frame at or before each row; -1 if there is none."""
        return np.searchsorted(self.keys[:, 2], rows, side="right") - 1

    def row_of(self, pts: int | None) -> int | None:
        """The row with this pts, in an index of packets, where pts rise; None if there is none."""
        if pts is None:
            return None
        row = int(self.pts.searchsorted(pts))
        return row if row < len(self.pts) and self.pts[row] == pts else None


class _Packet(NamedTuple):
    """A packet whose frame is shown; pts and duration are in the stream's own unit, and layers as in `layer_reader`."""

    pts: int
    duration: int
    is_damaged: bool
    layer: int
    is_disposable: bool


def index_of_packets(
    path: Path,
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    packets: "Iterable[av.Packet[av.VideoStream]]",
    logged: Sequence[LogLine],
) -> FrameIndex | None:
    """Read a video's `packets`, without decoding; None if they do not tell which frames it shows.

    Raises:
        VideoError: The file ends before the first frame that can be decoded.
    """
    shown: list[_Packet] = []  # in the file's order
    intact = 0  # number of `shown` up to the last one whose own packet is whole
    complete_pts = NO_PTS  # every frame up to it is in `shown`, since packets come in the order of their dts
    keys: list[tuple[int, int]] = []  # pts, dts
    first_pts: int | None = None
    broken, healed_pts = False, NO_PTS  # damage lasts until a key frame, also for frames that are shown before it
    has_hidden_frames = stream.codec_context.name == "vp8"
    layer_of = layer_reader(stream)
    damage, lost, heard = "", "", len(logged)
    try:
        for packet in packets:
            if not packet.size:
                continue
            if packet.pts is None:
                return None
            if first_pts is None:
                first_pts = packet.pts
            lost = _complaint(container, logged[heard:])  # of packets before this one
            if lost:
                broken = True
                for row in range(len(shown))[-MAX_REORDERED:]:
                    if shown[row].pts >= complete_pts:  # the last ones before the loss: nobody knows until when
                        shown[row] = shown[row]._replace(is_damaged=True)
            heard = len(logged)
            if packet.is_corrupt:
                broken = True
            elif packet.is_keyframe:
                keys.append((packet.pts, _dts_of(packet)))
                if broken:
                    broken, healed_pts = False, packet.pts
            # Frames before the first key frame cannot be decoded, as at the start of a file that was cut from another
            # one. Frames that an edit list removes are only there to decode others.
            if keys and not packet.is_discard and not (has_hidden_frames and not memoryview(packet)[0] & VP8_SHOWN):
                layer = layer_of(packet) if layer_of else None
                if layer is None:
                    layer_of = None
                is_broken = broken or packet.pts < healed_pts
                shown.append(_Packet(packet.pts, packet.duration or 0, is_broken, *(layer or ALWAYS_DECODED)))
                if not packet.is_corrupt:
                    intact, complete_pts = len(shown), _dts_of(packet)
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        damage = str(error.strerror)
    damage = lost or _complaint(container, logged[heard:]) or damage
    damage = damage or ("a packet is truncated" if intact < len(shown) else "") or _cut_off(path, container)
    first_key = min(keys, default=(NO_PTS, 0))[0]
    if not damage:
        complete_pts = np.iinfo(np.int64).max
    frames = sorted(packet for packet in shown[:intact] if first_key <= packet.pts <= complete_pts)
    if not frames and damage:
        raise VideoError(f"video {path} has no frame that can be decoded ({damage}); download it again")
    pts, durations, damaged, layers, disposable = np.array(frames, np.int64).reshape(-1, len(_Packet._fields)).T
    if first_pts is None or len(pts) == 0 or (np.diff(pts) == 0).any():
        return None
    keys_k2 = np.unique(np.array(keys, np.int64), axis=0)
    starts_s = _seconds(pts, container, stream)
    return FrameIndex(
        pts=pts,
        starts_s=starts_s,
        end_s=_end_s(starts_s, int(durations[-1]), stream),
        keys=np.column_stack([keys_k2, np.searchsorted(pts, keys_k2[:, 0])]),
        first_pts=first_pts,
        damaged=damaged.astype(bool),
        damage=damage,
        disposable=disposable.astype(bool) & (layers == max(packet.layer for packet in shown)) if layer_of else None,
    )


@dataclass(frozen=True)
class _Shown:
    """A decoded frame; pts and dts are in the stream's own unit."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_damaged: bool
    sum: int


class _Sent(NamedTuple):
    """A packet that the decoder was given: its number, dts, and whether it is a key frame."""

    number: int
    dts: int
    is_key: bool


def index_of_frames(
    path: Path, container: "av.container.InputContainer", stream: "av.VideoStream", logged: Sequence[LogLine]
) -> FrameIndex:
    """Decode a video from its first packet to its last.

    Raises:
        VideoError: No frame can be decoded, or the frames have no times, or times that go back.
    """
    packets: dict[int, _Sent] = {}  # by pts
    frames: list[_Shown] = []
    broken_at: int | None = None  # number of the last packet that could not be decoded
    key_pts, broken_before = NO_PTS, NO_PTS
    damage, lost, heard = "", "", len(logged)
    try:
        for number, packet in enumerate(container.demux(stream)):
            if packet.pts is not None:
                packets.setdefault(packet.pts, _Sent(number, _dts_of(packet), packet.is_keyframe))
                key_pts = packet.pts if packet.is_keyframe else key_pts
            if packet.size:
                lost = _complaint(container, logged[heard:])  # of packets before this one
                if lost:
                    broken_at = number - 1
                    frames[-1:] = [replace(last, is_damaged=True) for last in frames[-1:]]
            complaints = len(logged)
            decoded = decode(packet)
            complained, heard = len(logged) > complaints, len(logged)
            if complained and packet.is_keyframe and stream.codec_context.name == "h264":
                complained = False  # it is about frames before the key frame; a damaged key frame is itself marked so
            if decoded is None or packet.is_corrupt or complained:
                if packet.pts is not None and packet.pts < key_pts:
                    broken_before = key_pts  # nothing from the key frame on depends on what is shown before it
                else:
                    broken_at = number
            for frame in decoded or ():
                sent_at = packets[frame.pts].number if frame.pts in packets else -1
                # The decoder returns frames some packets late: only a key frame from after the damage ends it.
                if broken_at is not None and frame.key_frame and not frame.is_corrupt and sent_at > broken_at:
                    broken_at = None
                is_damaged = broken_at is not None or frame.is_corrupt or pts_of(frame) < broken_before
                is_key = frame.key_frame and not is_damaged
                frames.append(_Shown(frame.pts, frame.dts, frame.duration, is_key, is_damaged, checksum(frame)))
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        damage = str(error.strerror)
    damage = lost or _complaint(container, logged[heard:]) or damage or _cut_off(path, container)
    # Frames before the first key frame depend on something that was cut off. Some codecs do not mark key frames.
    whole = [row for row, frame in enumerate(frames) if not frame.is_damaged]
    if not whole:
        reason = damage or ("no keyframe" if not frames else "every frame is damaged")
        raise VideoError(f"video {path} has no frame that can be decoded ({reason}); download it again")
    leading = next((row for row in whole if frames[row].is_key), whole[0])
    frames = frames[leading:]
    starts_s = _seconds(np.array(_times_of(path, frames), np.int64), container, stream)
    keys = [
        (frame.pts, packets[frame.pts].dts, row)
        for row, frame in enumerate(frames)
        if frame.is_key and frame.pts in packets and packets[frame.pts].is_key
    ]
    return FrameIndex(
        pts=np.array([pts_of(frame) for frame in frames], np.int64),
        starts_s=starts_s,
        end_s=_end_s(starts_s, frames[-1].duration, stream),
        keys=np.array(keys, np.int64).reshape(-1, 3),
        first_pts=NO_PTS,
        damaged=np.array([frame.is_damaged for frame in frames]),
        damage=damage,
        leading=leading,
        sums=np.array([frame.sum for frame in frames], np.uint32),
    )


def decode(packet: "av.Packet[av.VideoStream]") -> "list[av.VideoFrame] | None":
    """The frames that the decoder returns when it is given `packet`; None if it fails."""
    try:
        return packet.decode()
    except av.error.MemoryError:
        raise
    except av.FFmpegError:
        return None


def _dts_of(packet: "av.Packet[av.VideoStream]") -> int:
    """The packet's dts, its pts where it has none."""
    dts = packet.pts if packet.dts is None else packet.dts
    assert dts is not None
    return dts


def pts_of(frame: "av.VideoFrame | _Shown") -> int:
    """The frame's pts, `NO_PTS` if it has none."""
    return NO_PTS if frame.pts is None else frame.pts


def checksum(frame: "av.VideoFrame") -> int:
    """Checksum of a frame's first plane, without the padding of its lines."""
    plane, form = frame.planes[0], frame.format
    bits = -(-form.components[0].bits // 8) * 8 if form.is_planar else form.padded_bits_per_pixel
    lines = np.frombuffer(plane, np.uint8).reshape(-1, abs(plane.line_size))
    return zlib.crc32(lines[: plane.height, : -(-plane.width * bits // 8)].tobytes())


def _times_of(path: Path, frames: Sequence[_Shown]) -> list[int]:
    """Time at which each frame appears: its pts, or its dts if pts go back; without one, a frame after the previous."""
    pts = [pts_of(frame) for frame in frames if frame.pts is not None]
    goes_back = any(later <= earlier for earlier, later in pairwise(pts))
    times: list[int] = []
    for frame in frames:
        time = frame.dts if goes_back else frame.pts
        if not times and frame.pts is not None:
            time = frame.pts if time is None else min(time, frame.pts)
        if time is None and times:
            gap = int(np.median(np.diff(times))) if len(times) > 1 else frame.duration
            time = times[-1] + gap
        if time is None:
            raise VideoError(
                f"video {path} has frames without times, like a raw stream; put it into a container:"
                f" ffmpeg -i {path.name} -c copy {path.stem}.mp4"
            )
        if times and time < times[-1]:
            raise VideoError(
                f"video {path} has frames whose times go back; convert it: ffmpeg -i {path.name} {path.stem}_new.mp4"
            )
        times.append(time)
    return times


def _cut_off(path: Path, container: "av.container.InputContainer") -> str:
    """What is missing at the end of a file whose reader does not notice it; empty if nothing is."""
    missing = missing_bytes(path, container.format.name)
    return f"it is {counted(missing, 'byte')} shorter than it declares" if missing else ""


def _complaint(container: "av.container.InputContainer", logged: Sequence[LogLine]) -> str:
    """The first message that the container's reader logged; the decoder's messages are about single frames."""
    return next((message.strip() for _, part, message in logged if part == container.format.name), "")


def _seconds(
    pts: NDArray[np.int64], container: "av.container.InputContainer", stream: "av.VideoStream"
) -> NDArray[np.float64]:
    """Times on the file's timeline in a player; containers count in microseconds at best."""
    return np.round(pts * float(stream.time_base) - (container.start_time or 0) / av.time_base, 6)


def _end_s(starts_s: NDArray[np.float64], duration: int, stream: "av.VideoStream") -> float:
    gap_s = float(np.median(np.diff(starts_s))) if len(starts_s) > 1 else 0.0
    return float(starts_s[-1]) + (duration * float(stream.time_base) or gap_s)
