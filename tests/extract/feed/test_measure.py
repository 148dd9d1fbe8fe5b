"""Decoding is measured under the conditions of a job: quick clips share tasks, and all children are busy."""

import time
from pathlib import Path

import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed import measure
from egopatch.extract.feed.measure import measure_decoding
from egopatch.extract.feed.pool import TOGETHER, DecodePool, UndecodedClip


def name_quickly(clip: Clip, *_: object) -> str:
    if clip.clip_id == "bad":
        raise ValueError("no video")
    return clip.clip_id


def name_slowly(clip: Clip, *_: object) -> str:
    time.sleep(0.4)
    return clip.clip_id


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of clips in each task."""
    sizes: list[int] = []
    schedule = DecodePool._schedule

    def counted(self: DecodePool[str], clips: list[Clip], slots: list[int | None]) -> object:
        sizes.append(len(clips))
        return schedule(self, clips, slots)

    monkeypatch.setattr(DecodePool, "_schedule", counted)
    return sizes


def test_quick_clips_share_tasks(tasks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED_S", 0.5)
    with DecodePool(VideoConfig(), 1, name_quickly) as pool:
        found = measure_decoding(pool, [Clip(name, Path("a.mp4")) for name in ("a", "bad", "b")], 1)
    assert tasks[-1] == TOGETHER
    first, failed, last = found.first
    assert (first, last) == ("a", "b")
    assert isinstance(failed, UndecodedClip)
    assert found.seconds >= 0.5
    assert found.decoded / 2 == pytest.approx(found.failed, abs=1)


def test_few_clips_keep_all_children_busy(tasks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip of 0.4 s, three children that sleep at the same time: about 7.5 clips/s."""
    monkeypatch.setattr(measure, "MEASURED_S", 0.1)
    with DecodePool(VideoConfig(), 3, name_slowly) as pool:
        found = measure_decoding(pool, [Clip("a", Path("a.mp4"))], 3)
    assert found.decoded == 6
    assert 4 < found.decoded / found.seconds < 12
    assert set(tasks) == {1}
