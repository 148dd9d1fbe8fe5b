"""Frames kept as decoded planes convert to the same pixels as in FFmpeg."""

from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import Pixels
from egopatch.extract.video import planes
from egopatch.extract.video.frames import read_frames, read_planes
from egopatch.extract.video.planes import Colours, Planes, even, find_colours
from egopatch.extract.video.transforms import Window
from tests.extract.video.videos import noise, show_turned, write_video

# AVColorSpace of what cameras write: unspecified, BT.709, BT.601, BT.2020.
MATRICES = {"unspecified": 2, "bt709": 1, "bt470bg": 5, "smpte170m": 6, "bt2020": 9}


def rgb_of(run: Pixels) -> NDArray[np.uint8]:
    """[F, h, w, 3] of planes that came through shared memory."""
    height, width = run.cut.window.height, run.cut.window.width
    assert run.cut.colours is not None
    frames = []
    for content in run.frames:
        assert isinstance(content, np.ndarray)
        y, u, v = np.split(content, [height * width, height * width * 5 // 4])
        halved = (height // 2, width // 2)
        frames.append(Planes(y.reshape(height, width), u.reshape(halved), v.reshape(halved), run.cut.colours).rgb())
    return np.stack(frames)


@pytest.mark.parametrize("color_range", list(ColorRange)[:3], ids=lambda color_range: color_range.name)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", ["yuv420p", "yuvj420p"])
def test_all_colours_match_ffmpeg(name: str, matrix: str, color_range: ColorRange) -> None:
    """All 2^24 for two matrices; one in sixteen for the others, which differ only in their coefficients."""
    colours = find_colours(name, MATRICES[matrix], color_range, 512, 512)
    assert colours is not None
    u = np.arange(256, dtype=np.uint8)[:, None].repeat(256, axis=1)
    every = name == "yuv420p" and color_range == ColorRange.MPEG and matrix in ("bt709", "smpte170m")
    for first in range(0, 256, 4 if every else 64):
        y = np.tile(np.arange(first, first + 4, dtype=np.uint8).reshape(2, 2), (256, 256))
        frame = Planes(y, u, u.T.copy(), colours)
        assert np.array_equal(frame.rgb(), planes._converted(frame, name, MATRICES[matrix], color_range))


@pytest.mark.parametrize("size", [(96, 64), (98, 66), (854, 480), (202, 360), (2, 2), (16, 2), (1280, 722)])
def test_frames_of_any_even_size_keep_their_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=4, size=size, draw=noise, pix_fmt="yuv420p")
    config = VideoConfig(frames=4)
    expected = read_frames(Clip("a", path), config)
    found = read_planes(Clip("a", path), config)
    for frame, pixels in zip(found.frames, expected.frames, strict=True):
        assert isinstance(frame, Planes)
        assert np.array_equal(frame.rgb(), pixels)
        assert frame.nbytes == pixels.nbytes // 2
        assert frame.shape == pixels.shape[:2]
    assert np.array_equal(found.times_s, expected.times_s)


@pytest.mark.parametrize(
    ("size", "pix_fmt", "codec"),
    [
        ((96, 64), "yuv444p", "libx264"),
        ((96, 64), "yuv422p", "libx264"),
        ((96, 64), "yuv420p10le", "libx264"),
        ((97, 64), "yuv444p", "libx264"),
        ((97, 63), "yuv420p", "ffv1"),  # odd sizes share the colours of the last line and column
        ((96, 64), "bgr0", "ffv1"),
        ((96, 64), "yuv420p", "interlaced"),
    ],
)
def test_unsupported_pixel_formats_and_sizes_become_rgb(
    size: tuple[int, int], pix_fmt: str, codec: str, tmp_path: Path
) -> None:
    options = {} if codec == "ffv1" else {"crf": "10"}
    if codec == "interlaced":
        codec, options = "libx264", {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    path = tmp_path / "a.mkv"
    write_video(path, frames=4, size=size, draw=noise, pix_fmt=pix_fmt, codec=codec, options=options)
    config = VideoConfig(frames=2)
    expected = read_frames(Clip("a", path), config).frames
    found = read_planes(Clip("a", path), config).frames
    for frame, pixels in zip(found, expected, strict=True):
        assert isinstance(frame, np.ndarray)
        assert np.array_equal(frame, pixels)


def test_frames_with_reversed_lines_are_not_kept_as_planes() -> None:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=96, height=64, format="yuv420p", time_base=Fraction(1, 15))
    graph.link_nodes(source, graph.add("vflip"), graph.add("buffersink")).configure()
    graph.push(av.VideoFrame.from_ndarray(noise(0, (96, 64)), format="rgb24").reformat(format="yuv420p"))
    flipped = graph.pull()
    assert flipped.planes[0].line_size < 0
    assert planes.planes_of(flipped) is None


def test_a_turned_video_becomes_rgb(tmp_path: Path) -> None:
    path = show_turned(write_video(tmp_path / "a.mp4", draw=noise), (0, 1, -1, 0))
    config = VideoConfig(frames=2)
    expected = read_frames(Clip("a", path), config).frames
    found = read_planes(Clip("a", path), config).frames
    assert found[0].shape == (96, 64, 3)
    assert np.array_equal(np.stack(found), np.stack(expected))


def test_missing_frames_are_black(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=3)
    config = VideoConfig(frames=5, short="zeros")
    found = read_planes(Clip("a", path), config).frames
    assert [isinstance(frame, Planes) for frame in found] == [True] * 3 + [False] * 2
    for frame in found[3:]:
        assert np.array_equal(frame, np.zeros((64, 96, 3), np.uint8))


def test_colour_conversions_that_are_not_additive_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = planes._converted

    def mixed(frame: Planes, *form: object) -> NDArray[np.uint8]:
        pixels = convert(frame, *form)  # type: ignore[arg-type]
        return (pixels.astype(int) * frame.y[..., None] // 255).astype(np.uint8)

    def at_the_edge(frame: Planes, *form: object) -> NDArray[np.uint8]:
        pixels = convert(frame, *form)  # type: ignore[arg-type]
        if frame.shape[1] == 322:
            pixels[:, -2:] ^= 1  # as if the last columns were converted by other code
        return pixels

    for odd, found in ((mixed, [False, False]), (at_the_edge, [True, False])):
        planes.find_colours.cache_clear()
        planes._measured.cache_clear()
        monkeypatch.setattr(planes, "_converted", odd)
        assert [bool(find_colours("yuv420p", 1, 1, width, 240)) for width in (320, 322)] == found
    planes.find_colours.cache_clear()
    planes._measured.cache_clear()


@pytest.mark.parametrize("window", [(0, 0, 4, 6), (1, 3, 3, 3), (1, 2, 5, 4), (2, 1, 2, 5)])
def test_windows_cut_from_planes_are_widened_to_even_bounds(window: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    y, u, v = (rng.integers(0, 256, shape, np.uint8) for shape in ((6, 8), (3, 4), (3, 4)))
    colours = find_colours("yuv420p", 1, 1, 8, 6)
    assert colours is not None
    whole, found = Planes(y, u, v, colours), even(Window(*window))
    bottom, right = window[0] + window[2], window[1] + window[3]
    assert found.top <= window[0]
    assert found.left <= window[1]
    assert found.top + found.height in (bottom, bottom + 1)
    assert found.left + found.width in (right, right + 1)
    rows, columns = slice(found.top, found.top + found.height), slice(found.left, found.left + found.width)
    part = whole.cut(found)
    assert np.array_equal(part.rgb(), whole.rgb()[rows, columns])
    memory = np.zeros(part.nbytes, np.uint8)
    part.copy_to(memory)
    assert np.array_equal(memory, np.concatenate([part.y.ravel(), part.u.ravel(), part.v.ravel()]))


def test_planes_of_different_sizes_are_refused() -> None:
    y, half = np.zeros((4, 6), np.uint8), np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"u or v has shape \(4, 6\); expected half of y's, \(4, 6\)"):
        Planes(y, half, y, Colours(b""))


def test_planes_outlive_their_video(tmp_path: Path) -> None:
    """They are in the decoder's memory, which it must not reuse while they exist."""
    path = write_video(tmp_path / "a.mp4", draw=noise)
    expected = read_frames(Clip("a", path), VideoConfig(frames=8)).frames
    found = read_planes(Clip("a", path), VideoConfig(frames=8)).frames
    for _ in range(3):
        with av.open(str(path)) as file:
            list(file.decode(video=0))
    for frame, pixels in zip(found, expected, strict=True):
        assert isinstance(frame, Planes)
        assert np.array_equal(frame.rgb(), pixels)
