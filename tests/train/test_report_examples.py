"""The examples of the report: which are chosen, their pictures and the outlines of kept patches."""

import re
from pathlib import Path

import numpy as np

from egopatch.train.report import examples as report_examples
from tests.train.fake_runs import write_dataset


def test_overlay_outlines_what_was_kept_and_dims_the_rest() -> None:
    #  . K K
    #  . K .
    drawn = report_examples.overlay(np.array([1, 2, 4]), (2, 3))
    assert drawn.dimmed == "M0 0h1v1h-1zM0 1h1v1h-1zM2 1h1v1h-1z"
    edges = set(re.findall(r"M\d \d[hv]1", drawn.outline))
    assert edges == {"M1 0h1", "M2 0h1", "M2 1h1", "M1 2h1", "M1 0v1", "M3 0v1", "M1 1v1", "M2 1v1"}


def test_the_overlay_ignores_padding_and_handles_all_or_none_kept() -> None:
    assert report_examples.overlay(np.array([-1, 0, 99]), (1, 2)).dimmed == "M1 0h1v1h-1z"
    assert report_examples.overlay(np.arange(4), (2, 2)).dimmed == ""
    assert report_examples.overlay(np.array([], dtype=int), (1, 2)) == report_examples.Overlay("M0 0h2v1h-2z", "")


def test_long_clips_show_eight_frames_spread_evenly() -> None:
    assert report_examples.shown_frames(4) == [0, 1, 2, 3]
    assert report_examples.shown_frames(16) == [1, 3, 5, 7, 9, 11, 13, 15]


def test_pictures_are_cropped_as_for_the_encoder(tmp_path: Path) -> None:
    from egopatch.extract.datasets import load_dataset
    from egopatch.extract.encoders.networks.lite import TRANSFORM
    from egopatch.extract.feed.on_host import crop_and_resize
    from egopatch.extract.video.frames import read_frames
    from egopatch.extract.video.indexing.cache import VideoCache
    from egopatch.extract.video.transforms import EGOVLP_TRANSFORM

    config = write_dataset(tmp_path / "data", clips=1, questions=3)
    clip = load_dataset(config.data).clips[0]
    for transform in (EGOVLP_TRANSFORM, TRANSFORM):
        shown = report_examples.prepare_picture(clip, config.video, VideoCache(), transform).frames
        seen = crop_and_resize(read_frames(clip, config.video).frames, config.video.size, transform).numpy()
        # The same field of view at twice the side: patch by patch the same mean.
        patches = [
            frames.reshape(4, 3, 7, side // 7, 7, side // 7).mean((3, 5))
            for frames, side in ((shown, 224), (seen, 112))
        ]
        np.testing.assert_allclose(*patches, atol=0.02)


def test_examples_are_wins_losses_and_a_seeded_draw() -> None:
    names = {f"q{i}": f"c{i}" for i in range(40)}
    ours = {q: i % 2 == 0 for i, q in enumerate(names)}
    others = [{q: i % 3 == 0 for i, q in enumerate(names)}, {q: i % 5 == 0 for i, q in enumerate(names)}]
    chosen = report_examples.choose(names, ours, others, 4)
    assert [kind for kind, _ in chosen] == ["win"] * 4 + ["loss"] * 4 + ["drawn"] * 4
    assert len({q for _, q in chosen}) == 12
    assert all(ours[q] and not any(o[q] for o in others) for kind, q in chosen if kind == "win")
    assert all(not ours[q] and any(o[q] for o in others) for kind, q in chosen if kind == "loss")
    assert chosen == report_examples.choose(dict(reversed(names.items())), ours, others, 4)
    drawn = [q for kind, q in chosen if kind == "drawn"]
    flipped = {q: not right for q, right in ours.items()}
    assert drawn == [q for kind, q in report_examples.choose(names, flipped, others, 4) if kind == "drawn"]


def test_examples_prefer_clips_that_are_not_shown_yet() -> None:
    clips = {f"q{i}": f"c{i % 5}" for i in range(20)}
    chosen = report_examples.choose(clips, dict.fromkeys(clips, True), [dict.fromkeys(clips, False)], 2)
    wins = [clips[q] for kind, q in chosen if kind == "win"]
    drawn = [clips[q] for kind, q in chosen if kind == "drawn"]
    assert len(set(wins)) == 2
    assert not set(wins) & set(drawn)
