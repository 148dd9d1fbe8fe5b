"""Sweeps: members equal to runs of their own, one reading, resumable, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Config, ConfigError
from tests.train.tiny import losses, with_run
from train import crew
from train.batches import Batch
from train.run import fit
from train.sweep import read_axes, run_sweep


def test_members_equal_runs_of_their_own(tiny: Config) -> None:
    path = run_sweep(tiny, ratios=[0.25, 1.0], seeds=[0])
    result = json.loads(path.read_text())
    assert path == tiny.run.dir.parent / "sweeps" / "direct-psa" / "sweep.json"
    assert [(m["ratio"], m["seed"], m["dir"]) for m in result["members"]] == [
        (0.25, 0, "ratio-0.25_seed-0"),
        (1.0, 0, "ratio-1.0_seed-0"),
    ]
    alone = with_run(tiny, "alone", head_ratio=0.25)
    metrics = fit(alone, "x")
    folder = path.parent / "ratio-0.25_seed-0"
    # Sums of a stack are taken in another order; the members' noise is the same.
    np.testing.assert_allclose(losses(folder), losses(alone.run.dir), rtol=1e-4)
    assert result["members"][0]["all"] == pytest.approx(metrics.all.accuracy, abs=2)


def test_members_share_one_reading(tiny: Config) -> None:
    one = json.loads(run_sweep(tiny, ratios=[0.5], name="one").read_text())
    many = json.loads(run_sweep(tiny, ratios=[0.1, 0.5], seeds=[0, 1], name="many").read_text())
    assert one["bytes_read"] == many["bytes_read"] > 0
    assert many["trained"] == 4
    assert {m["seed"] for m in many["members"]} == {0, 1}


def test_stopped_sweep_goes_on_and_a_finished_one_trains_nothing(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(run_sweep(tiny, ratios=[0.25, 0.5], name="whole").read_text())
    real = crew.Crew.learn
    steps = iter(range(100))

    def dies(self: crew.Crew, batch: Batch, last: bool) -> None:
        real(self, batch, last)
        if next(steps) == 12:  # within the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(crew.Crew, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tiny, ratios=[0.25, 0.5])
    monkeypatch.setattr(crew.Crew, "learn", real)
    path = run_sweep(tiny, ratios=[0.25, 0.5])
    again = json.loads(path.read_text())
    assert again["members"] == whole["members"]
    for name in ("ratio-0.25", "ratio-0.5"):
        assert losses(path.parent / name) == losses(path.parent.parent / "whole" / name)
    assert json.loads(run_sweep(tiny, ratios=[0.25, 0.5]).read_text())["trained"] == 0


def test_grid_file_varies_any_field_of_the_head(tiny: Config, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("head.scores: [[question], [random]]\ntrain.lr: [1.0e-3]\n")
    result = json.loads(run_sweep(tiny, grid=grid, name="grid").read_text())
    assert [m["overrides"] for m in result["members"]] == [
        {"head.scores": ["question"], "train.lr": 0.001},
        {"head.scores": ["random"], "train.lr": 0.001},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head.name: [psa]", "head.name cannot vary in a sweep"),
        ("store.path: [a, b]", "store.path cannot vary in a sweep; expected one of head.ratio"),
        ("head.ratio: 0.5", r"expected lines such as head.dropout: \[0.0, 0.1\]"),
        ("head.ratio: [0.5, 0.5]", "head.ratio has a value twice"),
        ("{", "expected a YAML file"),
    ],
)
def test_bad_grids_are_refused(tmp_path: Path, text: str, message: str) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_axes(None, None, grid)


def test_nothing_to_vary_and_bad_values(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="nothing varies; give --ratios"):
        run_sweep(tiny)
    with pytest.raises(ConfigError, match=r"head\.ratio is 1\.5 in the sweep"):
        run_sweep(tiny, ratios=[1.5])
    assert "head.ratio" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--name is '\.\./x'; expected letters"):
        run_sweep(tiny, ratios=[0.5], name="../x")
