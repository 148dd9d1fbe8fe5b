"""What the decoders of a job pass to their encoders, and how much shared memory they get."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed import decoders
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.pixels import FrameKind
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM
from tests.extract.video.videos import write_video

FREE = 10**9
VIDEO = VideoConfig(frames=4, size=32)
KIND = FrameKind(VIDEO.size, EGOVLP_TRANSFORM, planes=True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Number and size of the slots that were created, without starting children."""
    slots: list[tuple[int, int]] = []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    monkeypatch.setattr(decoders, "SharedSlots", lambda count, size, *_: slots.append((count, size)))
    monkeypatch.setattr(decoders, "DecodePool", lambda *_: None)
    return slots


def test_pixels_get_at_most_a_quarter_of_the_free_memory(made: list[tuple[int, int]]) -> None:
    padding = decoders.ALIGNMENT * (VIDEO.frames + 1)
    for kinds in ([KIND], [KIND, replace(KIND, size=64)]):
        decoders.open_decoders(VIDEO, kinds, 2, 40)
        count, size = made.pop()
        assert FREE / 5 < count * size < FREE / 4 + count * len(kinds) * padding


def test_ample_memory_gives_slots_for_the_largest_frames(
    made: list[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**15))
    decoders.open_decoders(VIDEO, [KIND], 2, 40)
    assert made[0][1] == 4 * 3 * 1080 * 1080 + 4 * decoders.ALIGNMENT


@pytest.mark.parametrize("planes", [(True, True), (True, False)])
def test_colours_are_converted_once_if_one_encoder_needs_it(planes: tuple[bool, bool], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    other = replace(EGOVLP_TRANSFORM, short_side=48)
    kinds = [FrameKind(32, t, each) for t, each in zip((EGOVLP_TRANSFORM, other), planes, strict=True)]
    with decoders.open_decoders(VIDEO, kinds, 1, 2) as pool:
        (found,) = pool.map([Clip("a", path)])
    assert isinstance(found, PreparedClip)
    first, second = (part.frames for part in found.for_encoders([0, 1]))
    assert [run.cut.colours is not None for run in (*first, *second)] == [all(planes)] * 2


def test_a_clip_for_two_encoders_survives_what_one_does_to_its_frames() -> None:
    clip = PreparedClip(Clip("a", Path("a")), np.ones((2, 3, 4, 4), np.float32), np.zeros(2, np.float32), "sha", 1, 0.0)
    first, second, third = clip.for_encoders([0, 0, 0])
    for part in (third, second, first):
        assert isinstance(part.frames, np.ndarray)
        assert part.frames.all()
        part.frames[:] = 0
