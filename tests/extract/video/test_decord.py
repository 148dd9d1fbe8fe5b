"""decord gives PyAV's pixels, or refuses the file: it never shows another frame."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.__main__ import main
from egopatch.extract.datasets import Clip
from egopatch.extract.video.frames import VideoError, read_frames
from egopatch.extract.worker.job_stats import read_jobs
from tests.extract.job import CLIPS, options
from tests.extract.video import videos
from tests.extract.video.odd_videos import ODD, moving
from tests.extract.video.test_hard_videos import READABLE, UNREADABLE, quadrants
from tests.extract.video.test_needed import CODED
from tests.extract.video.videos import B_FRAMES, show_turned, write_video

FILES: dict[str, Callable[[Path], Path]] = {
    **{name: odd.make for name, odd in ODD.items()},
    **{name: case.make for name, case in READABLE.items()},
    **{name: case.make for name, case in CODED.items()},
    **{name: make for name, (make, _) in UNREADABLE.items()},
    "turned": lambda to: show_turned(write_video(to / "a.mp4", draw=quadrants), (0, 1, -1, 0)),
    "mirrored": lambda to: show_turned(write_video(to / "a.mp4", draw=quadrants), (-1, 0, 0, 1)),
}
# Ordinary files as most data sets contain them, which decord must not refuse.
ORDINARY = ("h264", "h264 in mkv", "h264, no b-frames", "vp9", "av1", "turned", "claims 1 s", "starts at 2 s", "mjpeg")


@pytest.fixture(autouse=True)
def wider_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test videos are 128 pixels wide instead of 96, which decord 3.4 refuses on CPUs with AVX-512."""
    write = videos.write_video
    monkeypatch.setattr(
        write, "__defaults__", tuple((128, 64) if one == (96, 64) else one for one in write.__defaults__)
    )


@pytest.mark.parametrize("name", FILES)
def test_decord_and_pyav_pixels_are_equal_or_the_file_is_refused(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path)
    for start_s, end_s, frames in ((None, None, 4), (0.3, 1.1, 3), (1.2, 1.4, 1), (0.9, 1.9, 5)):
        refusal = assert_equal_or_refused(Clip("a", path, start_s, end_s), frames, path)
        assert not (refusal and name in ORDINARY), refusal


def assert_equal_or_refused(clip: Clip, frames: int, path: Path) -> str:
    """Returns the refusal, if any."""
    try:
        got = read_frames(clip, VideoConfig(frames=frames, decoder="decord"))
    except VideoError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith((f"video {path} ", "clip a "))
        assert "\n" not in refusal
        return refusal
    expected = read_frames(clip, VideoConfig(frames=frames))
    np.testing.assert_array_equal(got.times_s, expected.times_s)
    assert all(np.array_equal(one, other) for one, other in zip(got.frames, expected.frames, strict=True))
    return ""


@pytest.mark.parametrize("seed", range(10))
def test_damage_that_decord_conceals_is_refused(seed: int, tmp_path: Path) -> None:
    path = damaged_frames(write_video(tmp_path / "a.mp4", options=B_FRAMES, draw=moving), seed)
    assert_equal_or_refused(Clip("a", path), 8, path)


def damaged_frames(path: Path, seed: int) -> Path:
    """Flip three bits of the pictures of an mp4."""
    rng, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    for place in rng.integers(content.index(b"mdat") + 1000, content.rindex(b"moov"), 3):
        content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return path


def test_a_refusal_says_what_to_do(tmp_path: Path) -> None:
    path = READABLE["edit list"].make(tmp_path)
    with pytest.raises(VideoError, match=r"it counts 30 frames, but the file shows 25; use video\.decoder pyav"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="decord"))


def test_decord_is_imported_only_when_chosen(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    code = (
        "import sys; from pathlib import Path; from egopatch.configs.schema import VideoConfig;"
        "from egopatch.extract.datasets import Clip; from egopatch.extract.video.frames import read_frames\n"
        "for decoder in ('pyav', 'decord'):\n"
        f"    read_frames(Clip('a', Path({str(path)!r})), VideoConfig(decoder=decoder))\n"
        "    print('decord' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.slow
def test_a_store_may_have_clips_of_either_decoder(fresh: Path) -> None:
    """The choice is recorded with the job and is not part of the fingerprint."""
    assert main(["synth", "--out", str(fresh / "data"), "--clips", str(CLIPS + 3)]) == 0
    assert main(["run", *options(fresh, "--video.decoder", "decord")]) == 0
    jobs = read_jobs(fresh / "store")
    assert [(job["decoder"], job["committed"]) for job in jobs] == [("pyav", CLIPS), ("decord", 3)]
