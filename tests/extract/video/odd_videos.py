"""Videos that break a rule which nearly all others keep, and a plain full decode to compare with.

The files in `tests/data/videos` cannot be made with PyAV. `size_changes.mp4`, `packed_bframes.avi` and `field_pairs.ts`
are samples of FFmpeg's own tests (the last one cut to ten packets).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from egopatch.extract.video.opening import opened
from tests.extract.video.videos import B_FRAMES, FPS, holding, write_audio, write_video

FILES = Path(__file__).resolve().parents[2] / "data" / "videos"
TS_PACKET = 188
TS_CLOCK_WRAPS_S = 2**33 / 90000


@dataclass(frozen=True)
class Odd:
    """A video that is right where its frames are those of a full decode.

    Attributes:
        make: Writes it into a folder.
        times_s: Time of each frame from the file's start, where the frames do not tell it.
    """

    make: Callable[[Path], Path]
    times_s: Sequence[float] | None = None


def full_decode(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times [count] from the file's start, and upright pixels, of every frame: decoded from the first to the last."""
    with opened(path) as file:
        stream = max(file.streams.video, key=lambda one: one.frames)
        start_s = (file.start_time or 0) / av.time_base
        frames = list(file.decode(stream))
        times = [np.nan if frame.pts is None else frame.pts * float(stream.time_base) - start_s for frame in frames]
        pixels = [frame.to_ndarray(format="rgb24", threads=1) for frame in frames]
        return np.array(times), [np.rot90(one, frame.rotation // 90) for one, frame in zip(pixels, frames, strict=True)]


def moving(index: int, size: tuple[int, int]) -> np.ndarray:
    """A picture with a texture that moves, so that every frame depends on the one before."""
    texture = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3)).astype(np.uint8)
    return np.kron(np.roll(texture, index, axis=1), np.ones((4, 4, 1), np.uint8))


def rewrite(
    path: Path,
    change: Callable[[int, "av.Packet[av.VideoStream]"], Iterable["av.Packet[av.VideoStream]"]],
    ending: str | None = None,
) -> Path:
    """The same video with the packets that `change(number, packet)` returns for each of its own."""
    target = path.with_name(f"changed-{path.name}").with_suffix(ending or path.suffix)
    with av.open(str(path)) as source, av.open(str(target), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.dts is not None:
                for changed in change(number, packet):
                    changed.stream = stream
                    file.mux(changed)
    return target


def all_marked(path: Path) -> Path:
    """The same video with a mark on every packet that says it is a key frame."""

    def mark(_: int, packet: "av.Packet[av.VideoStream]") -> list["av.Packet[av.VideoStream]"]:
        packet.is_keyframe = True
        return [packet]

    return rewrite(path, mark)


def one_by_one(_: int, packet: "av.Packet[av.VideoStream]") -> list["av.Packet[av.VideoStream]"]:
    """Change nothing but the container."""
    return [packet]


def without_ts_packet(path: Path, share: float) -> Path:
    """Remove one packet of a transport stream, as a bad reception does."""
    content = path.read_bytes()
    lost = int(len(content) / TS_PACKET * share) * TS_PACKET
    path.write_bytes(content[:lost] + content[lost + TS_PACKET :])
    return path


def with_preview(path: Path) -> Path:
    """A film behind a track of small pictures; only the film is marked as the default."""
    film = write_video(path.with_name("film.mp4"), options=B_FRAMES, draw=moving)
    with av.open(str(film)) as source, av.open(str(path), "w") as file:
        preview = file.add_stream("mjpeg", rate=1)
        preview.width, preview.height, preview.pix_fmt = 96, 64, "yuvj420p"
        stream = file.add_stream_from_template(source.streams.video[0])
        preview.disposition, stream.disposition = 0, av.stream.Disposition.default
        for index in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, 1 / preview.codec_context.framerate
            file.mux(preview.encode(frame))
        file.mux(preview.encode())
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    return path


def renamed_codec(path: Path) -> Path:
    """Let an mp4 name a codec that nobody knows."""
    path.write_bytes(path.read_bytes().replace(b"avc1", b"vvXX"))
    return path


def kept(name: str) -> Callable[[Path], Path]:
    """Copy a file of `FILES`."""

    def copy(to: Path) -> Path:
        (to / name).write_bytes((FILES / name).read_bytes())
        return to / name

    return copy


def coded(ending: str, codec: str, pix_fmt: str = "yuv420p", **options: str) -> Callable[[Path], Path]:
    """Thirty frames with a key frame every ten."""
    every = {"g": "10", **options}
    fps = 25 if codec.startswith("mpeg") else 20  # a GIF counts in hundredths, MPEG allows few rates
    return lambda to: write_video(to / f"a.{ending}", codec=codec, options=every, pix_fmt=pix_fmt, draw=moving, fps=fps)


ODD = {
    "every packet marked, mpeg4": Odd(lambda to: all_marked(coded("mp4", "mpeg4", b="4000000")(to))),
    "every packet marked, wmv2": Odd(lambda to: all_marked(coded("avi", "wmv2", b="4000000")(to))),
    "every packet marked, hevc": Odd(
        lambda to: all_marked(coded("mp4", "libx265", **{"x265-params": "log-level=none:keyint=10"})(to))
    ),
    "every packet marked, h264": Odd(lambda to: all_marked(coded("mp4", "libx264", bf="2")(to))),
    "intra refresh": Odd(coded("mp4", "libx264", **{"x264-params": "intra-refresh=1:keyint=10"})),
    "hidden frames": Odd(kept("hidden_frames.webm")),
    "field pairs": Odd(kept("field_pairs.ts")),
    "packed b-frames": Odd(kept("packed_bframes.avi"), times_s=[1001 / 30000 * i for i in range(1, 16)]),
    # AVI has no place for the order in which frames are shown; the decoder finds it, two frames late.
    "avi with b-frames": Odd(
        lambda to: write_video(to / "a.avi", options=B_FRAMES, draw=moving),
        times_s=[i / FPS for i in (1, *range(3, 32))],
    ),
    "the clock wraps": Odd(
        lambda to: write_video(to / "a.ts", options=B_FRAMES, draw=moving, first=int((TS_CLOCK_WRAPS_S - 1) * FPS))
    ),
    "a preview first": Odd(lambda to: with_preview(to / "a.mov")),
    "size changes": Odd(kept("size_changes.mp4")),
    "exif": Odd(kept("exif_mjpeg.avi")),
    "latin-1 title": Odd(kept("latin1_title.avi")),
    "colons": Odd(lambda to: write_video(to / "a.mp4", draw=moving).rename(to / "12:30:00.mp4")),
    "percent": Odd(lambda to: write_video(to / "a.mp4", draw=moving).rename(to / "100%03d é.mp4")),
    "one frame": Odd(lambda to: write_video(to / "a.mp4", frames=1, draw=moving)),
    "varying rate": Odd(lambda to: write_video(to / "a.mp4", draw=moving, pts=[i * i for i in range(30)])),
    "10 bit": Odd(coded("mp4", "libx264", "yuv420p10le")),
    "4:4:4": Odd(coded("mp4", "libx264", "yuv444p", bf="2")),
    "interlaced": Odd(coded("mp4", "libx264", **{"x264-params": "tff=1"})),
    "gif": Odd(coded("gif", "gif", "rgb8")),
    "apng": Odd(coded("apng", "apng", "rgb24")),
    "mjpeg": Odd(coded("avi", "mjpeg", "yuvj420p")),
    "prores": Odd(coded("mov", "prores_ks", "yuv422p10le")),
    "ffv1": Odd(coded("mkv", "ffv1")),
    "huffyuv": Odd(coded("avi", "huffyuv", "yuv422p")),
    "av1": Odd(coded("mp4", "libsvtav1")),
    "vp9": Odd(coded("webm", "libvpx-vp9", **{"auto-alt-ref": "1", "lag-in-frames": "10"})),
    "mpeg2": Odd(coded("mpg", "mpeg2video", bf="2", b="4000000")),
    "mpeg2 in ts": Odd(coded("ts", "mpeg2video", bf="2", b="4000000")),
    "mpeg1": Odd(coded("mpg", "mpeg1video", b="4000000")),
    "mpeg4 with b-frames": Odd(coded("mp4", "mpeg4", b="4000000", bf="2")),
    "msmpeg4": Odd(coded("avi", "msmpeg4", b="4000000")),
    "flv": Odd(coded("flv", "flv", b="4000000")),
    "realvideo 1": Odd(coded("rm", "rv10", b="4000000")),
    "realvideo 2": Odd(coded("rm", "rv20", b="4000000")),
}

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown codec": (
        lambda to: renamed_codec(write_video(to / "a.mp4")),
        r"FFmpeg has no decoder for its codec, none \(vvXX / 0x58587676\); convert it to H\.264",
    ),
    "music with a cover": (kept("song.mp3"), r"it has no picture track \(tracks: audio, cover\)"),
    "raw h264": (
        lambda to: write_video(to / "a.h264", options=B_FRAMES),
        r"has frames without times, like a raw stream; put it into a container: ffmpeg -i a\.h264 -c copy a\.mp4",
    ),
    "text": (holding(b"not a video\n" * 100), "cannot be decoded: Invalid data found"),
    "audio in mp4": (lambda to: write_audio(to / "a.mp4"), r"it has no picture track \(tracks: audio\)"),
}
