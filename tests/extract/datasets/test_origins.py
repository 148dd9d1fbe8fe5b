"""The name that a store records for a video file: relative to the data set's folder if the file is inside it."""

from pathlib import Path

import pytest

from egopatch.extract.datasets import Clip
from egopatch.extract.datasets.origins import compare_origins, origin_of


@pytest.mark.parametrize(
    ("root", "video", "name"),
    [
        ("/data", "/data/videos/a.mp4", "videos/a.mp4"),
        ("/data", "/data2/a.mp4", "/data2/a.mp4"),
        ("/", "/videos/a.mp4", "videos/a.mp4"),
        (".", "videos/a.mp4", "videos/a.mp4"),
        ("data", "data/data/a.mp4", "data/a.mp4"),
        ("data", "/data/a.mp4", "/data/a.mp4"),
    ],
)
def test_recorded_video_name_is_relative_within_the_data_root(root: str, video: str, name: str) -> None:
    clip = Clip("a", Path(video), 1, 2.5)
    origin = origin_of(clip, Path(root), 7)
    assert (origin.file, origin.start_s, origin.end_s) == (name, 1.0, 2.5)
    unrecorded, not_stored = Clip("b", Path(video)), Clip("c", Path(video))
    check = compare_origins([clip, unrecorded, not_stored], Path(root), {"a": origin, "b": None})
    assert (check.stale, check.unrecorded) == ({}, 1)
