"""Intervals of paired differences, the better blind baseline, the breakdown by tag."""

from pathlib import Path

import numpy as np

from egopatch.train.report.analysis import best_blind_row, paired_clip_interval, tag_lines
from egopatch.train.rundir.results import gather
from tests.train.fake_runs import write_run


def test_paired_interval_is_over_clips() -> None:
    difference = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    one_clip_each = paired_clip_interval(difference, list("abcdefgh"))
    two_clips = paired_clip_interval(difference, list("aaaabbbb"))
    assert one_clip_each is not None
    assert two_clips == (0.0, 100.0)
    assert 0 < one_clip_each[0] < 50 < one_clip_each[1] < 100
    assert paired_clip_interval(np.zeros(5), list("abcde")) == (0.0, 0.0)
    assert paired_clip_interval(np.array([]), []) is None


def test_paired_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(60):
        difference = generator.choice([-1.0, 0.0, 1.0], 400, p=[0.2, 0.5, 0.3])
        low, high = paired_clip_interval(difference, [str(i) for i in range(400)], seed=trial) or (0, 0)
        hits += low <= 10 <= high
    assert 51 <= hits <= 60  # 95% of 60 is 57; under 51 or so would be one in a thousand


def test_better_blind_and_tags(tmp_path: Path) -> None:
    tags = {"object": {"accuracy": 40.0, "n": 10}, "zebra": {"accuracy": None, "n": 0}}
    write_run(tmp_path, "a", model="majority", all_=30, tags=tags)
    write_run(tmp_path, "b", model="question-only", all_=31, tags=tags | {"world": {"accuracy": 10.0, "n": 5}})
    rows = gather(tmp_path).rows
    blind = best_blind_row(rows)
    assert blind is not None
    assert blind.label == "question-only"
    lines = tag_lines(rows)
    assert [(line.family, line.tag, line.n) for line in lines] == [
        ("scope", "world", 5),
        ("semantics", "object", 10),
        ("other", "zebra", 0),
    ]
    assert lines[0].accuracy == {"question-only": 10.0}
