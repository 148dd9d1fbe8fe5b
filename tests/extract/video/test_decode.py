import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.decode import DecodePool, PreparedClip, UndecodedClip, prepare_clip
from tests.extract.video.videos import write_video

SMALL = VideoConfig(frames=2, size=32)


def hang_on_b(clip: Clip, video: VideoConfig) -> PreparedClip:
    if clip.clip_id == "b":
        time.sleep(60)
    return prepare_clip(clip, video)


def allocate_on_b(clip: Clip, video: VideoConfig) -> PreparedClip:
    if clip.clip_id == "b":
        np.ones(2 * 1024**3, np.uint8)
    return prepare_clip(clip, video)


def die_on_b(clip: Clip, video: VideoConfig) -> PreparedClip:
    if clip.clip_id == "b":
        os._exit(3)
    return prepare_clip(clip, video)


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    video = write_video(tmp_path / "a.mp4")
    return [Clip(name, video) for name in "abc"]


def test_clips_come_back_in_order_and_equal_to_this_process(clips: list[Clip]) -> None:
    with DecodePool(SMALL, 2, prepare_clip) as pool:
        results = list(pool.map(clips * 3))
    assert [one.clip for one in results] == clips * 3
    expected = prepare_clip(clips[0], SMALL)
    for one in results:
        assert isinstance(one, PreparedClip)
        # Children resize on one thread, this process on several: the last bit may differ.
        np.testing.assert_allclose(one.frames, expected.frames, rtol=0, atol=1e-6)
        assert one.source == expected.source


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (hang_on_b, r"took over 3 s to decode \(video\.timeout_s\); its decoder was killed"),
        (allocate_on_b, r"took over 1 GB of memory to decode \(video\.memory_gb\)"),
        (die_on_b, "died with exit code 3"),
    ],
)
def test_a_child_that_fails_costs_only_its_clip(prepare: object, reason: str, clips: list[Clip]) -> None:
    video = VideoConfig(frames=2, size=32, timeout_s=3, memory_gb=1)
    started = time.monotonic()
    with DecodePool(video, 1, prepare=prepare) as pool:  # type: ignore[arg-type]
        a, b, c = pool.map(clips)
    assert time.monotonic() - started < 40
    assert isinstance(a, PreparedClip)
    assert isinstance(c, PreparedClip)
    assert isinstance(b, UndecodedClip)
    assert re.search(reason, b.reason), b.reason


def test_a_bad_file_comes_back_with_reason_and_traceback(tmp_path: Path) -> None:
    with DecodePool(SMALL, 1, prepare_clip) as pool:
        (result,) = pool.map([Clip("x", tmp_path / "none.mp4")])
    assert isinstance(result, UndecodedClip)
    assert "does not exist" in result.reason
    assert "VideoError" in result.traceback
