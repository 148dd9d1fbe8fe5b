"""Videos as real data sets hold them: right frames at their true times, or a reason that names the cause."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video import orientation
from egopatch.extract.video.container import open_video
from egopatch.extract.video.frames import DecodedClip, VideoError, read_frames, read_planes, uniform_indices
from egopatch.extract.video.orientation import Upright
from egopatch.features.common.units import counted
from tests.extract.video.odd_videos import REFUSED
from tests.extract.video.videos import (
    B_FRAMES,
    FPS,
    behind_sound,
    claim_duration,
    cut_off,
    frame_numbers,
    holding,
    noise,
    show_turned,
    start_at,
    without_packets,
    write_video,
)

MEDIA = Path(__file__).resolve().parents[3].parent / "shared" / "media"
ALL = tuple(range(30))


@dataclass(frozen=True)
class Readable:
    """A file in which `shown` of the thirty frames can be seen, the first at `first_s` of its timeline."""

    make: Callable[[Path], Path]
    shown: tuple[int, ...] = ALL
    unit_s: float = 1e-4  # how exactly the container keeps time
    first_s: float = 0.0


READABLE = {
    "b-frames": Readable(lambda to: write_video(to / "a.mp4", options=B_FRAMES)),
    "open groups": Readable(lambda to: write_video(to / "a.mp4", options={**B_FRAMES, "x264-params": "open-gop=1"})),
    "hevc, open groups": Readable(
        lambda to: write_video(
            to / "a.mp4", codec="libx265", options={"x265-params": "log-level=none:open-gop=1:keyint=10"}
        )
    ),
    "mkv": Readable(lambda to: write_video(to / "a.mkv", options=B_FRAMES), unit_s=1e-3),
    "webm": Readable(lambda to: write_video(to / "a.webm", codec="libvpx-vp9", options={}), unit_s=1e-3),
    "transport stream": Readable(lambda to: write_video(to / "a.ts", options=B_FRAMES)),
    "avi": Readable(lambda to: write_video(to / "a.avi", codec="mpeg4", options={"b": "4000000"})),
    "fragmented": Readable(
        lambda to: write_video(
            to / "a.mp4", options=B_FRAMES, container={"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        )
    ),
    "odd size": Readable(lambda to: write_video(to / "a.mp4", size=(97, 61))),
    "width 144": Readable(lambda to: write_video(to / "a.mp4", size=(144, 80))),
    "two pixels": Readable(lambda to: write_video(to / "a.mp4", size=(2, 2))),
    "starts at 2 s": Readable(lambda to: write_video(to / "a.mp4", first=30)),
    "mkv starts at 2 s": Readable(lambda to: write_video(to / "a.mkv", first=30), unit_s=1e-3),
    "edit list": Readable(lambda to: start_at(write_video(to / "a.mp4", options=B_FRAMES), 5), shown=ALL[5:]),
    "claims 1 s": Readable(lambda to: claim_duration(write_video(to / "a.mp4", options=B_FRAMES), 1)),
    "claims 500 s": Readable(lambda to: claim_duration(write_video(to / "a.mp4", options=B_FRAMES), 500)),
    # The first group has lost its keyframe, so that its twelve frames are lost with it.
    "no first keyframe": Readable(
        lambda to: without_packets(write_video(to / "a.mp4", options=B_FRAMES), lambda number, key: number == 0),
        shown=ALL[12:],
        first_s=11 / FPS,
    ),
    "no first keyframe, mkv": Readable(
        lambda to: without_packets(write_video(to / "a.mkv", options=B_FRAMES), lambda number, key: number == 0),
        shown=ALL[12:],
        unit_s=1e-3,
        first_s=10 / FPS,
    ),
    "sound first": Readable(lambda to: behind_sound(write_video(to / "a.mp4", options=B_FRAMES), 1), first_s=1.0),
}


@pytest.mark.parametrize("name", READABLE)
def test_readable_file_yields_the_sampled_frames_at_their_times(name: str, tmp_path: Path) -> None:
    case = READABLE[name]
    path = case.make(tmp_path)
    for frames in (1, 4, len(case.shown)):
        chosen = uniform_indices(len(case.shown), frames)
        decoded = read_frames(Clip("a", path), VideoConfig(frames=frames))
        assert frame_numbers(decoded.frames) == [case.shown[i] for i in chosen]
        np.testing.assert_allclose(decoded.timestamps, case.first_s + chosen / FPS, atol=case.unit_s)
        np.testing.assert_allclose(decoded.times_s, decoded.timestamps, atol=1e-6)
        again = read_frames(Clip("a", path), VideoConfig(frames=frames))
        assert np.array_equal(again.frames, decoded.frames)
        assert np.array_equal(again.timestamps, decoded.timestamps)


@pytest.mark.parametrize("name", READABLE)
def test_seeking_gives_the_same_pixels_as_reading_from_the_start(name: str, tmp_path: Path) -> None:
    path = READABLE[name].make(tmp_path)
    with open_video(path) as file:
        everything = file.pixels(np.arange(len(file.index.pts)))
    for row in (len(everything) - 1, 0, len(everything) // 2):
        with open_video(path) as file:
            assert np.array_equal(file.pixels(np.array([row]))[0], everything[row])


def test_clip_times_count_from_the_first_displayed_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", first=30, options=B_FRAMES)
    decoded = read_frames(Clip("a", path, 1.0, 2.0), VideoConfig(frames=3))
    assert frame_numbers(decoded.frames) == [15 + i for i in uniform_indices(15, 3)]
    np.testing.assert_allclose(decoded.timestamps, uniform_indices(15, 3) / FPS, atol=1e-4)


def quadrants(index: int, size: tuple[int, int]) -> np.ndarray:
    """Top left 240, top right 160, bottom left 80, bottom right 20."""
    width, height = size
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 240
    pixels[: height // 2, width // 2 :] = 160
    pixels[height // 2 :, : width // 2] = 80
    pixels[height // 2 :, width // 2 :] = 20
    return pixels


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), [[240, 160], [80, 20]]),
        ((0, 1, -1, 0), [[80, 240], [20, 160]]),  # a quarter clockwise
        ((-1, 0, 0, -1), [[20, 80], [160, 240]]),
        ((0, -1, 1, 0), [[160, 20], [240, 80]]),  # a quarter anticlockwise
        ((-1, 0, 0, 1), [[160, 240], [20, 80]]),  # mirrored
        ((1, 0, 0, -1), [[80, 20], [240, 160]]),  # flipped upside down
    ],
)
def test_a_rotated_file_is_turned_upright(matrix: tuple[int, ...], shown: list[list[int]], tmp_path: Path) -> None:
    path = show_turned(write_video(tmp_path / "a.mp4", draw=quadrants, size=(96, 64)), matrix)  # type: ignore[arg-type]
    frames = np.stack(read_frames(Clip("a", path), VideoConfig(frames=2)).frames)
    turned = matrix[0] == 0
    assert frames.shape == ((2, 96, 64, 3) if turned else (2, 64, 96, 3))
    height, width = frames.shape[1:3]
    corners = frames[:, [[height // 4], [3 * height // 4]], [width // 4, 3 * width // 4]]  # [T, 2, 2, 3]
    np.testing.assert_allclose(corners, np.array(shown)[None, :, :, None].repeat(3, -1).repeat(2, 0), atol=4)


def test_rotation_that_changes_mid_video_is_applied_per_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = quadrants(0, (96, 64))
    monkeypatch.setattr(orientation, "to_rgb", lambda *_: pixels)

    def frame(rotation: int, *matrix: int) -> object:
        side_data = {"DISPLAYMATRIX": np.array(matrix, "<i4").tobytes()} if matrix else {}
        of_cpu = SimpleNamespace(name="yuv420p")
        return SimpleNamespace(format=of_cpu, rotation=rotation, side_data=side_data)

    turned = frame(-90, 0, 1 << 16, 0, -1 << 16, 0)
    upright = Upright(tmp_path / "a.mp4")
    for _ in range(2):
        assert np.array_equal(upright(frame(0)), pixels)  # type: ignore[arg-type]
        assert np.array_equal(upright(turned), np.rot90(pixels, -1))  # type: ignore[arg-type]


def test_a_file_rotated_by_an_odd_angle_is_refused(tmp_path: Path) -> None:
    path = show_turned(write_video(tmp_path / "a.mp4"), (1, 1, -1, 1))
    with pytest.raises(VideoError, match="rotated by an odd angle; expected 0, 90, 180 or 270 degrees"):
        read_frames(Clip("a", path), VideoConfig(frames=2))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_short_clip_is_repeated_padded_or_refused_as_configured(count: int, tmp_path: Path) -> None:
    clip = Clip("a", write_video(tmp_path / "a.mp4", frames=count))
    repeated = read_frames(clip, VideoConfig(frames=5, short="repeat"))
    assert frame_numbers(repeated.frames) == uniform_indices(count, 5).tolist()
    np.testing.assert_allclose(repeated.timestamps, uniform_indices(count, 5) / FPS, atol=1e-4)
    padded = read_frames(clip, VideoConfig(frames=5, short="zeros"))
    assert frame_numbers(padded.frames[:count]) == list(range(count))
    assert np.stack(padded.frames[count:]).max() == 0
    with pytest.raises(VideoError, match=rf"clip a has {counted(count, 'frame')}; video\.frames requires 5"):
        read_frames(clip, VideoConfig(frames=5, short="quarantine"))


def other_case(to: Path) -> Path:
    (to / "A.MP4").touch()
    return to / "a.mp4"


def other_form(to: Path) -> Path:
    (to / "caf\u00e9.mp4").touch()
    return to / "cafe\u0301.mp4"


def annexed(to: Path) -> Path:
    (to / "a.mp4").symlink_to(".git/annex/a")
    return to / "a.mp4"


def folder(to: Path) -> Path:
    (to / "a.mp4").mkdir()
    return to / "a.mp4"


def damaged_middle(to: Path) -> Path:
    """Noise in the pictures, with every header intact."""
    path = write_video(to / "a.mp4", draw=noise)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    middle = start + (len(content) - start) // 3
    content[middle : middle + 3000] = np.random.default_rng(1).bytes(3000)
    path.write_bytes(content)
    return path


def pipe(to: Path) -> Path:
    os.mkfifo(to / "a.mp4")
    return to / "a.mp4"


def device(to: Path) -> Path:
    (to / "a.mp4").symlink_to("/dev/zero")
    return to / "a.mp4"


def playlist(to: Path) -> Path:
    segment = write_video(to / "b.mp4").name
    lines = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{segment}\n#EXT-X-ENDLIST\n"
    return holding(lines.encode(), "a.m3u8")(to)


FASTSTART = {"movflags": "faststart"}
UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda to: to / "a.mp4", "does not exist; put the file there or correct its path"),
    "other case": (other_case, "does not exist, but 'A.MP4' is there; use one spelling in both places"),
    "other form": (other_form, r"does not exist, but 'caf\\xe9.mp4' is there; use one spelling in both places"),
    "link to nothing": (annexed, r"is a link to \.git/annex/a, which does not exist; fetch that file"),
    "in no folder": (lambda to: to / "none" / "a.mp4", "does not exist; put the file there"),
    "archive": (holding(b"\x1f\x8b", "a.tar.gz"), "a.tar.gz is an archive; unpack it and name a video in it"),
    "a folder": (folder, "is a folder; expected a regular file"),
    "a pipe": (pipe, "is a named pipe; expected a regular file"),
    "a device": (device, "is a device; expected a regular file"),
    "HLS playlist": (playlist, r"is a list of other files \(Apple HTTP Live Streaming\), not a video; join them into"),
    "concat file": (
        lambda to: holding(f"ffconcat version 1.0\nfile {write_video(to / 'b.mp4').name}\n".encode(), "a.mp4")(to),
        r"is a list of other files \(Virtual concatenation script\), not a video",
    ),
    "empty": (holding(b""), r"is empty \(0 bytes\)"),
    "pointer of LFS": (
        holding(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "a.mp4 is a pointer of Git LFS, not the file itself; run `git lfs pull` to fetch it",
    ),
    "garbage": (holding(np.random.default_rng(0).bytes(4096)), "cannot be decoded: Invalid data found"),
    "index cut off": (lambda to: cut_off(write_video(to / "a.mp4"), 0.4), "moov atom not found"),
    "index half cut off": (
        lambda to: cut_off(write_video(to / "a.mp4"), 0.81),
        r"it has no picture track \(tracks: none\)",
    ),
    "tail cut off": (
        lambda to: cut_off(write_video(to / "a.mp4", draw=noise, container=FASTSTART), 0.7),
        r"is truncated at 1\.\d\d\d s \(stream 0, offset 0x\w+: partial file\)",
    ),
    "tail of mkv cut off": (
        lambda to: cut_off(write_video(to / "a.mkv", draw=noise), 0.7),
        r"is truncated at 1\.\d\d\d s \(File ended prematurely\)",
    ),
    "no keyframe": (
        lambda to: without_packets(write_video(to / "a.mp4", options=B_FRAMES), lambda number, key: key),
        r"no frame that can be decoded \(no keyframe\)",
    ),
    "damaged in the middle": (damaged_middle, r"cannot be decoded"),
    **REFUSED,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_error_gives_the_cause(name: str, tmp_path: Path) -> None:
    make, reason = UNREADABLE[name]
    path = make(tmp_path)
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(Clip("a", path), VideoConfig(frames=16))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_frames, read_planes])
def test_unsupported_colour_space_is_not_reported_as_damage(
    read: Callable[[Clip, VideoConfig], DecodedClip[Any]], tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", frames=8, options={"crf": "10", "x264-params": "colormatrix=YCgCo"})
    with pytest.raises(VideoError, match=r"csp:ycgco .*; convert it to H\.264 with the colours of BT\.709$"):
        read(Clip("a", path), VideoConfig(frames=4))


def test_clip_before_the_damage_is_readable(tmp_path: Path) -> None:
    path = cut_off(write_video(tmp_path / "a.mkv", options={**B_FRAMES, "crf": "0"}, draw=grey_and_noise), 0.7)
    early = read_frames(Clip("early", path, 0.0, 0.5), VideoConfig(frames=4))
    np.testing.assert_allclose(early.timestamps, uniform_indices(8, 4) / FPS, atol=1e-3)
    with pytest.raises(VideoError, match="is truncated"):
        read_frames(Clip("late", path, 0.5, 5.0), VideoConfig(frames=4))


def grey_and_noise(index: int, size: tuple[int, int]) -> np.ndarray:
    return noise(index, size) // 8 + np.uint8(20 + 6 * index)


def test_missing_read_permission_is_reported(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = write_video(tmp_path / "videos" / "a.mp4")
    code = (
        "import os; from pathlib import Path; from egopatch.configs.schema import VideoConfig;"
        "from egopatch.extract.datasets import Clip; from egopatch.extract.feed.clips import read_clip;"
        "from egopatch.extract.video.indexing.cache import VideoCache\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"  # the superuser may read everything
        f"try: read_clip(Clip('a', Path({str(path)!r})), VideoConfig(), VideoCache(), ())\n"
        "except ValueError as error: print(error)"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    for closed in (path, path.parent):
        closed.chmod(0)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        closed.chmod(0o755)
        assert "cannot be read: Permission denied" in done.stdout


@pytest.mark.parametrize("seed", range(20))
def test_randomly_damaged_file_is_refused_or_yields_frames_in_order(seed: int, tmp_path: Path) -> None:
    """Flipped bits that the codec cannot notice may change pixels; they must not change which frames these are."""
    rng = np.random.default_rng(seed)
    path = write_video(tmp_path / "a.mp4", options=B_FRAMES)
    content = bytearray(path.read_bytes())
    for place in rng.integers(0, len(content), 8):
        content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    result: DecodedClip | str
    try:
        result = read_frames(Clip("a", path), VideoConfig(frames=4))
    except MemoryError:  # a size that the damaged file names
        return
    except VideoError as error:
        result = str(error)
    if isinstance(result, str):
        assert result.startswith(f"video {path} ")
        assert "\n" not in result
    else:
        assert len(result.frames) == 4
        assert (np.diff(result.timestamps) >= 0).all()


@pytest.mark.skipif(not MEDIA.is_dir(), reason="the folder of real videos is not here")
def test_real_egocentric_video_is_decoded() -> None:
    clip = Clip("a", MEDIA / "ego4d_sample.mp4")
    decoded = read_frames(clip, VideoConfig(frames=16))
    assert [frame.shape for frame in decoded.frames] == [(288, 384, 3)] * 16
    np.testing.assert_allclose(decoded.timestamps, uniform_indices(60, 16) / 30, atol=1e-4)
    assert np.stack(decoded.frames).std(axis=(1, 2, 3)).min() > 20  # pictures, none of them black or grey


@pytest.mark.skipif(not MEDIA.is_dir(), reason="the folder of real videos is not here")
def test_real_damaged_video_is_refused() -> None:
    with pytest.raises(VideoError, match=r"corrupted\.mp4 cannot be decoded at 2\.800 s: that frame is damaged"):
        read_frames(Clip("a", MEDIA / "corrupted.mp4"), VideoConfig(frames=16))
