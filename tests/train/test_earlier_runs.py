"""Runs, one of them interrupted, and a sweep that an earlier version left in `tests/data/earlier_runs`."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from egopatch.configs.schema import Config
from egopatch.train.fitting.fit import fit
from egopatch.train.report.sources import read_sweep
from egopatch.train.rundir.results import gather
from egopatch.train.sweeps.sweep import run_sweep
from tests.train.tiny import losses

LEFT = Path(__file__).parents[1] / "data" / "earlier_runs"


@pytest.fixture
def config(shared_tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of those runs, whose paths were relative, in a folder with copies of them."""
    shutil.copytree(LEFT, tmp_path / "runs")
    (tmp_path / "data").symlink_to(shared_tiny.data.root)
    (tmp_path / "store").symlink_to(shared_tiny.store.path)
    monkeypatch.chdir(tmp_path)
    return dataclasses.replace(
        shared_tiny,
        data=dataclasses.replace(shared_tiny.data, root=Path("data")),
        store=dataclasses.replace(shared_tiny.store, path=Path("store")),
        head=dataclasses.replace(shared_tiny.head, width=8),
        run=dataclasses.replace(shared_tiny.run, dir=Path("runs/psa")),
    )


def test_an_earlier_versions_finished_run_gives_the_same_answers(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = fit(config, "x")
    assert "already trained" in capsys.readouterr().out
    assert (config.run.dir / "predictions.jsonl").read_text() == (LEFT / "psa" / "predictions.jsonl").read_text()
    assert metrics.all.accuracy == json.loads((LEFT / "psa" / "test.json").read_text())["all"]["accuracy"]
    (row,) = gather(Path("runs")).rows
    assert (row.best.seed, row.mean("all")) == (0, metrics.all.accuracy)


def test_an_earlier_versions_interrupted_run_resumes_where_it_stopped(config: Config) -> None:
    # Without dropout, which has used another generator since then.
    interrupted = dataclasses.replace(
        config,
        head=dataclasses.replace(config.head, dropout=0.0),
        run=dataclasses.replace(config.run, dir=Path("runs/interrupted")),
    )
    fit(interrupted, "x")
    before = losses(LEFT / "interrupted")
    resumed = losses(interrupted.run.dir)
    assert resumed[: len(before)] == before
    # The losses of the uninterrupted run; another machine's sums differ in their last bits.
    np.testing.assert_allclose(resumed, losses(LEFT / "undisturbed"), rtol=1e-4)


def test_an_earlier_versions_sweep_is_reused_without_training(config: Config) -> None:
    path = run_sweep(config, ratios=[0.25, 1.0])
    left = json.loads((LEFT / "sweeps" / "direct-psa" / "sweep.json").read_text())
    result = json.loads(path.read_text())
    assert (result["planned"], result["trained"]) == (2, 0)
    assert [run["all"] for run in result["members"]] == [run["all"] for run in left["members"]]
    # Intervals have been computed differently since then.
    assert [point["all"]["mean"] for point in result["points"]] == [point["all"]["mean"] for point in left["points"]]
    assert [run.ratio for run in read_sweep(LEFT / "sweeps" / "direct-psa" / "sweep.json").runs] == [0.25, 1.0]
