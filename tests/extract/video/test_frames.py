import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.container import VideoFile
from egopatch.extract.video.frames import VideoError, read_frames, uniform_by_time, uniform_indices
from egopatch.extract.video.indexing.cache import VideoCache
from tests.extract.video.videos import B_FRAMES, behind_sound, frame_numbers, write_video


def published_rule(count: int, frames: int) -> list[int]:
    bounds = [int(count * i / frames) for i in range(frames + 1)]
    return [(first + following - 1) // 2 for first, following in itertools.pairwise(bounds)]


@pytest.mark.parametrize("count", [4, 5, 16, 31, 60, 1000])
def test_uniform_indices_match_the_published_rule(count: int) -> None:
    assert uniform_indices(count, 4).tolist() == published_rule(count, 4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_short_clip_repeats_its_nearest_frames(count: int) -> None:
    chosen = uniform_indices(count, 4)
    assert len(chosen) == 4
    assert set(chosen) == set(range(count))
    assert (np.diff(chosen) >= 0).all()


def test_variable_frame_rate_is_sampled_by_time_not_by_count() -> None:
    # Ten frames in the first second, one in the second: half of the spans lie in each.
    starts = np.array([*np.arange(10) * 0.1, 1.0])
    assert uniform_by_time(starts, 2.0, 4).tolist() == [2, 7, 10, 10]


def test_variable_frame_rate_file_is_sampled_by_timestamp(tmp_path: Path) -> None:
    pts = [*range(0, 1000, 100), *range(1000, 6000, 500)]
    clip = Clip("a", write_video(tmp_path / "vfr.mp4", frames=20, pts=pts))
    decoded = read_frames(clip, VideoConfig(frames=4))
    # The last frame has no duration of its own, so the clip ends at 5.5 s; by count they would be 2, 7, 12 and 17.
    assert frame_numbers(decoded.frames) == [6, 12, 14, 17]
    np.testing.assert_allclose(decoded.timestamps, [0.6, 2.0, 3.0, 4.5], atol=1e-3)


@pytest.mark.parametrize(("end", "stretch"), [(70.0, "[60.0, 70.0) s"), (None, "all from 60.0 s on")])
def test_clip_past_the_end_of_the_video_is_refused(end: float | None, stretch: str, tmp_path: Path) -> None:
    clip = Clip("a", write_video(tmp_path / "a.mp4"), 60.0, end)
    said = f"clip a is {stretch} of {clip.video}, but that video's frames are from 0.000 to 2.000 s; correct"
    with pytest.raises(VideoError, match=re.escape(said)):
        read_frames(clip, VideoConfig(frames=4))


def test_a_stretch_before_the_first_frame_is_refused(tmp_path: Path) -> None:
    """Where sound begins earlier, the end of the video does not explain it."""
    video = behind_sound(write_video(tmp_path / "a.mp4"), 3)
    with pytest.raises(
        VideoError, match=r"is \[0\.0, 1\.0\) s of .*, but that video's frames are from 3\.000 to 5\.000 s; correct"
    ):
        read_frames(Clip("a", video, 0.0, 1.0), VideoConfig(frames=4))


def test_clip_between_two_frames_yields_the_one_on_screen(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4")
    decoded = read_frames(Clip("a", video, 1.001, 1.02), VideoConfig(frames=2))
    assert frame_numbers(decoded.frames) == [15, 15]
    np.testing.assert_allclose(decoded.times_s, [1.0, 1.0])
    last = read_frames(Clip("a", video, 1.99, 1.995), VideoConfig(frames=1))
    assert frame_numbers(last.frames) == [29]


def test_relative_path_with_a_colon_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4").rename(tmp_path / "12:30:00.mp4")
    monkeypatch.chdir(tmp_path)
    assert frame_numbers(read_frames(Clip("a", Path("12:30:00.mp4")), VideoConfig(frames=1)).frames) == [14]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos whose packets are read, one for each time."""
    names: list[str] = []
    read = VideoFile._read_packets
    monkeypatch.setattr(VideoFile, "_read_packets", lambda file: names.append(file.path.stem) or read(file))
    return names


def test_clips_of_one_video_read_its_packets_once(tmp_path: Path, readings: list[str]) -> None:
    path, config = write_video(tmp_path / "a.mp4", options=B_FRAMES), VideoConfig(frames=3, size=32)
    parts = [Clip(str(start), path, start_s=start / 10, end_s=(start + 6) / 10) for start in range(0, 12, 3)]
    alone = [read_frames(part, config) for part in parts]
    readings.clear()
    cache = VideoCache()
    together = [read_frames(part, config, cache) for part in parts]
    assert readings == ["a"]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
        np.testing.assert_array_equal(one.timestamps, other.timestamps)


def test_a_video_that_was_replaced_is_indexed_anew(tmp_path: Path) -> None:
    path, config, cache = tmp_path / "a.mp4", VideoConfig(frames=3, size=32), VideoCache()
    write_video(path, frames=30)
    assert frame_numbers(read_frames(Clip("x", path), config, cache).frames) == [4, 14, 24]
    write_video(path, frames=9)
    assert frame_numbers(read_frames(Clip("x", path), config, cache).frames) == [1, 4, 7]
