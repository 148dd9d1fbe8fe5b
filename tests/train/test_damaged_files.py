"""A run's JSON file with any field edited is either read or refused in one line that names it."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from egopatch.configs.schema import Config, DataConfig, HeadConfig
from egopatch.extract.datasets import DatasetError
from egopatch.train.__main__ import main
from egopatch.train.explanation.agreement import Agreement
from egopatch.train.explanation.record import Explanation, ExplanationError, Ranking, read_explanation
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.trained import head_of
from egopatch.train.publishing.cards import head_card
from egopatch.train.publishing.origins import origins
from egopatch.train.report.analysis import config_of, frames_read, ratio_label
from egopatch.train.report.integrity import store_facts, versions
from egopatch.train.report.page import _explanation_charts
from egopatch.train.report.sources import SourceError, read_log, read_sweep
from egopatch.train.report.table import is_standin, is_synthetic
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.log import RunLog
from egopatch.train.rundir.names import GROUPS, SWEEPS
from egopatch.train.rundir.results import gather
from egopatch.train.rundir.run_folder import RunError, plain, require_same_settings
from egopatch.train.scores.statistics import Interval
from egopatch.train.sweeps.sweep import run_sweep
from tests.train.fake_runs import write_run, write_sweep
from tests.train.tiny import with_run

WRONG = (None, -1.5, "x", [[1]], {"a": [1]}, True, 10**400, float("inf"))


def edited(value: Any, depth: int) -> Iterator[Any]:
    """`value` with each of its fields down to `depth` removed, and replaced by each wrong value."""
    yield from WRONG
    if depth and isinstance(value, dict):
        for name in value:
            yield {other: value[other] for other in value if other != name}
            for wrong in edited(value[name], depth - 1):
                yield value | {name: wrong}
    elif depth and isinstance(value, list) and value:
        for wrong in edited(value[0], depth - 1):
            yield [wrong, *value[1:]]


def refused(path: Path, depth: int, read: Callable[[], Any], error: type[Exception]) -> int:
    """How many edits of the file at `path` are refused by `error`, by the file's name; other errors are raised."""
    messages = []
    for value in edited(json.loads(path.read_text()), depth):
        path.write_text(json.dumps(value))
        try:
            read()
        except error as fault:
            messages.append(str(fault))
    assert [text for text in messages if path.name not in text or "\n" in text] == []
    return len(messages)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    sections = {name: options for name, options in plain(Config()).items() if name in ("data", "head", "store")}
    return write_run(tmp_path, "psa", config=sections, card={"parameters": 12, "synthetic": False})


@pytest.mark.slow
def test_an_edited_card_opens_a_head_or_is_refused(run: Path) -> None:
    def read() -> None:
        card = Card.read(run)
        values = dataclasses.asdict(card)
        head_of(card, HeadConfig())
        origins(card)
        head_card(card, gather(run.parent).rows[0].best.scores, (), [])
        assert not (is_standin(values) and is_synthetic(values))

    assert refused(run / "card.json", 2, read, RunError) > 100


@pytest.mark.slow
def test_table_and_report_read_an_edited_card_or_name_the_fault(run: Path) -> None:
    write_run(run.parent, "good", model="egovlp")

    def read() -> None:
        results = gather(run.parent)
        if results.problems:
            (problem,) = results.problems
            raise SourceError(problem)
        (row,) = (row for row in results.rows if row.best.dir == run)
        versions(results)
        store_facts(results, [], Path())
        frames_read(row, config_of(row, Config()))
        ratio_label(row)

    assert refused(run / "card.json", 2, read, SourceError) > 50
    (run / "card.json").write_text("{}")
    assert refused(run / "test.json", 2, read, SourceError) > 50


def test_a_card_fault_prints_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "card.json"
    whole = json.loads(path.read_text())
    for place, value, fault in (
        (("answers",), "yes", "'answers' is 'yes'; expected a list"),
        (("parameters",), None, "'parameters' is None; expected a whole number"),
        (("versions",), [], "'versions' is []; expected an object"),
        (("seed",), -1, f"'seed' is -1; expected a number from 0 to {2**63 - 1}"),
        (("config", "data"), 3, "'data' is 3; expected an object"),
        (("config", "head", "width"), "wide", "head.width is 'wide'; expected a whole number"),
        (("config", "head", "width"), 0, "head.width is 0; expected a positive multiple of head.heads, 4"),
        (("lr",), 3, "Card.__init__() got an unexpected keyword argument 'lr'"),
    ):
        card = copy.deepcopy(whole)
        inner = card
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        path.write_text(json.dumps(card))
        options = ["--data.root", str(run), "--run.dir", str(run), "--to", str(run / "up")]
        assert main(["publish", *options]) == 1
        expected = f"train publish: failed: {path} is not a model card ({fault}); delete the folder and train again\n"
        assert capsys.readouterr().err == expected
    path.write_text("[" * 100_000)
    with pytest.raises(RunError, match=r"card\.json is not a model card \(it is nested too deeply\)"):
        Card.read(run)


def test_an_edited_explanation_is_drawn_or_refused(tmp_path: Path) -> None:
    gap, seen = Interval(1.0, 0.5, 1.5), Agreement(1.0, 2.0, 3.0, 4.0)
    ranking = Ranking("saliency", (9.0, 5.0, 1.0), (1.0, 5.0, 9.0), gap, gap, seen, 3.0)
    path = Explanation(4, 2, 9, (0.0, 0.5, 1.0), (ranking,)).write(tmp_path)

    def read() -> None:
        found = read_explanation(tmp_path)
        assert found is not None
        assert all(0 <= one.deletion_area <= 100 for one in found.rankings)
        _explanation_charts(f"{found.questions:,} {found.k:,} {found.patches:,}", found)

    assert refused(path, 4, read, ExplanationError) > 100


def test_an_edited_sweep_or_log_is_drawn_or_refused(tmp_path: Path) -> None:
    path = write_sweep(tmp_path) / "sweep.json"

    def read() -> None:
        sweep = read_sweep(path)
        assert len(sweep.points) <= len(sweep.runs)

    assert refused(path, 3, read, SourceError) > 50
    log = tmp_path / "log.jsonl"
    for event in edited({"event": "step", "step": 1, "loss": 0.5}, 1):
        log.write_text(json.dumps(event) + '\n{"event": "end"}\n')
        with suppress(SourceError):
            read_log(log)


def test_a_run_continues_a_log_with_a_damaged_byte(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"event": "step", "step": 1}\n{"event": "st\xff", "step"\n{"event": "step", "step": 3}\n')
    RunLog(tmp_path, 2).close()
    assert log.read_text() == '{"event": "step", "step": 1}\n'


def test_a_sweep_names_damaged_run_and_group_files(tiny: Config) -> None:
    config = with_run(tiny, "sweep", train_epochs=1)
    folder = run_sweep(config, ratios=[0.5, 1.0], name="two").parent
    (folder / "ratio-0.5" / "test.json").write_text("{}")
    with pytest.raises(RunError, match=r"ratio-0\.5: test\.json is damaged \(KeyError: 'open'\); evaluate the run"):
        run_sweep(config, ratios=[0.5, 1.0], name="two")
    group = config.run.dir.parent / SWEEPS / "new" / GROUPS / "group.json"
    group.parent.mkdir(parents=True)
    for text, fault in (("{", "is damaged"), ("{}", "holds no list of runs"), ("[[1]]", "holds no list of runs")):
        group.write_text(text)
        with pytest.raises(RunError, match=rf"group\.json {fault}.*; delete it to train its runs from the start"):
            run_sweep(config, ratios=[0.5], name="new")


def test_a_config_with_unreadable_data_does_not_claim_the_run_folder(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"data\.root is"):
        fit(with_run(tiny, "psa", data_root=tmp_path / "nowhere"), "x")
    require_same_settings(tiny.run.dir, tiny)  # as the corrected command does


def test_nothing_is_created_in_the_old_place_of_a_project_that_was_moved(tiny: Config, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    moved = dataclasses.replace(
        tiny,
        data=DataConfig(name="jsonl", root=gone / "stores"),
        run=dataclasses.replace(tiny.run, dir=gone / "stores" / "mine.runs" / "psa"),
    )
    source = write_run(tmp_path, "trained", card={"parameters": 1})
    for command in (lambda: fit(moved, "x"), lambda: evaluate(moved, "x", source=source)):
        with pytest.raises(DatasetError, match=r"data\.root is .*replace its old path in the config"):
            command()
    assert not gone.exists()
