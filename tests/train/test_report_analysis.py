"""The better blind baseline, the breakdown by tag."""

from pathlib import Path

from egopatch.train.report.analysis import best_blind_row, tag_lines
from egopatch.train.rundir.results import gather
from tests.train.fake_runs import write_run


def test_the_better_blind_baseline_and_the_tag_lines_are_found(tmp_path: Path) -> None:
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
