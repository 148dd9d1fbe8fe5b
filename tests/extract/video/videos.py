"""Small real video files whose frames encode their own index, and ways to make them unusual."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np

FPS = 15
SIMPLE = MappingProxyType({"crf": "10", "preset": "ultrafast"})
# Three frames that are shown before the one they were coded after, and a keyframe every twelve.
B_FRAMES = MappingProxyType({"crf": "10", "preset": "medium", "bf": "3", "b-adapt": "0", "g": "12"})


def level_of(index: int) -> int:
    """Grey level that frame `index` is filled with: far enough apart to survive compression."""
    return 20 + 6 * index


def frame_numbers(frames: Iterable[np.ndarray]) -> list[int]:
    """Which frames these are: inverse of `level_of`, for T frames [H, W, 3]."""
    return [round((float(frame.mean()) - 20) / 6) for frame in frames]


def grey(index: int, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8 of frame `index`."""
    return np.full((size[1], size[0], 3), level_of(index), np.uint8)


def noise(index: int, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8 that a codec can hardly compress."""
    return np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)


def write_video(
    path: Path,
    frames: int = 30,
    fps: int = FPS,
    size: tuple[int, int] = (96, 64),
    pts: Sequence[int] | None = None,
    codec: str = "libx264",
    options: Mapping[str, str] = SIMPLE,
    container: Mapping[str, str] = MappingProxyType({}),
    draw: Callable[[int, tuple[int, int]], np.ndarray] = grey,
    first: int = 0,
    pix_fmt: str | None = None,
) -> Path:
    """A video of `frames` frames.

    Args:
        path: its ending decides the container.
        frames: how many.
        fps: of a constant rate.
        size: (width, height).
        pts: times in milliseconds, where the rate varies.
        codec: FFmpeg's name of it.
        options: of the codec.
        container: options of the container.
        draw: [H, W, 3] uint8 of a frame.
        first: frames of nothing before the first one.
        pix_fmt: FFmpeg's name of the pixel format; by default one that the size allows.
    """
    with av.open(str(path), "w", options=dict(container)) as file:
        stream = file.add_stream(codec, rate=fps, options=dict(options))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt or ("yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p")
        time_base = Fraction(1, 1000) if pts else Fraction(1, fps)
        stream.codec_context.time_base = time_base
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(index, size), format="rgb24")
            frame.pts = pts[index] if pts else first + index
            frame.time_base = time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def holding(content: bytes, name: str = "a.mp4") -> Callable[[Path], Path]:
    """Writes a file that holds this, and no video, into a folder."""

    def write(to: Path) -> Path:
        (to / name).write_bytes(content)
        return to / name

    return write


def write_audio(path: Path) -> Path:
    """One second of silence."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
        frame.rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def behind_sound(path: Path, seconds: int) -> Path:
    """The same video from `seconds` on, and a second of silence from the file's start on."""
    target = path.with_name(f"behind-{path.name}")
    sound = write_audio(path.with_suffix(".m4a"))
    with av.open(str(path)) as video, av.open(str(sound)) as audio, av.open(str(target), "w") as file:
        streams = [file.add_stream_from_template(source.streams[0]) for source in (video, audio)]
        for source, stream, delay in zip((video, audio), streams, (seconds, 0), strict=True):
            for packet in source.demux(0):
                if packet.dts is not None:
                    packet.pts += int(delay / packet.time_base)
                    packet.dts += int(delay / packet.time_base)
                    packet.stream = stream
                    file.mux(packet)
    return target


def without_packets(path: Path, dropped: Callable[[int, bool], bool]) -> Path:
    """The same file without the packets for which `dropped(number, is_keyframe)` holds."""
    target = path.with_name(f"cut-{path.name}")
    with av.open(str(path)) as source, av.open(str(target), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.dts is not None and not dropped(number, packet.is_keyframe):
                packet.stream = stream
                file.mux(packet)
    return target


def cut_off(path: Path, share: float) -> Path:
    """Keep the first `share` of the file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def show_turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write (a, b, c, d) into an mp4's display matrix: (x, y) is then shown at (a x + c y, b x + d y)."""
    a, b, c, d = (value << 16 for value in matrix)
    _patch(path, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    return path


def claim_duration(path: Path, seconds: int) -> Path:
    """Write a wrong duration into all three of an mp4's headers."""
    content = path.read_bytes()
    (movie_unit,) = struct.unpack_from(">I", content, content.index(b"mvhd") + 4 + 12)
    (media_unit,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 4 + 12)
    _patch(path, b"mvhd", 16, struct.pack(">I", seconds * movie_unit))
    _patch(path, b"tkhd", 20, struct.pack(">I", seconds * movie_unit))
    _patch(path, b"mdhd", 16, struct.pack(">I", seconds * media_unit))
    return path


def start_at(path: Path, frame: int) -> Path:
    """Make an mp4's edit list show it from `frame` on; what comes before stays in the file."""
    content = path.read_bytes()
    (media_unit,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 4 + 12)
    place = content.index(b"elst") + 4 + 8 + 4
    (media_time,) = struct.unpack_from(">i", content, place)
    _patch(path, b"elst", 12, struct.pack(">i", media_time + frame * media_unit // FPS))
    return path


def _patch(path: Path, box: bytes, offset: int, value: bytes) -> None:
    """Overwrite the content of an mp4's first `box`."""
    content = bytearray(path.read_bytes())
    place = content.index(box) + 4 + offset
    content[place : place + len(value)] = value
    path.write_bytes(content)
