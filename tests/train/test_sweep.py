"""Sweeps: runs equal to separate ones, features read once, resuming, refusals."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config, ConfigError
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.processes.stopping import Stopped
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.sweeps import sweep
from egopatch.train.sweeps.axes import read_axes
from egopatch.train.sweeps.sweep import run_sweep
from egopatch.train.sweeps.sweep_results import describe
from tests.features.faults import fork
from tests.train.kills import after_each_batch, held, killed_after
from tests.train.tiny import losses, with_run, write_tiny

ROOT = Path(__file__).parents[2]


def test_runs_of_a_sweep_equal_separate_runs(tiny: Config) -> None:
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
    # Sums over stacked heads are taken in another order; the noise of each run is the same.
    np.testing.assert_allclose(losses(folder), losses(alone.run.dir), rtol=1e-4)
    assert result["members"][0]["all"] == pytest.approx(metrics.all.accuracy, abs=2)


@pytest.mark.slow
def test_each_seed_of_a_sweep_trains_as_in_a_separate_run(tiny: Config) -> None:
    path = run_sweep(tiny, seeds=[0, 1])
    for seed in (0, 1):
        alone = with_run(tiny, f"alone{seed}", train_seed=seed)
        fit(alone, "x")
        # Forked groups have a thread each, a run alone has all: their sums may be taken in another order.
        np.testing.assert_allclose(losses(path.parent / f"seed-{seed}"), losses(alone.run.dir), rtol=1e-4)


@pytest.mark.slow
def test_runs_of_a_sweep_read_the_features_once(tiny: Config) -> None:
    one = json.loads(run_sweep(tiny, ratios=[0.5], name="one").read_text())
    many = json.loads(run_sweep(tiny, ratios=[0.1, 0.5], seeds=[0, 1], name="many").read_text())
    assert one["bytes_read"] == many["bytes_read"] > 0
    assert many["trained"] == 4
    assert {m["seed"] for m in many["members"]} == {0, 1}


@pytest.mark.slow
def test_a_stopped_sweep_resumes_and_a_finished_one_trains_nothing(tiny: Config) -> None:
    whole = json.loads(run_sweep(tiny, ratios=[0.25, 0.5], name="whole").read_text())
    killed_after(13, lambda: run_sweep(tiny, ratios=[0.25, 0.5]))  # within the second epoch
    path = run_sweep(tiny, ratios=[0.25, 0.5])
    again = json.loads(path.read_text())
    assert again["members"] == whole["members"]
    for name in ("ratio-0.25", "ratio-0.5"):
        assert losses(path.parent / name) == losses(path.parent.parent / "whole" / name)
    assert json.loads(run_sweep(tiny, ratios=[0.25, 0.5]).read_text())["trained"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_to_all_processes_stops_every_run_group_at_its_place(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    path = run_sweep(tiny, ratios=[0.25, 0.5], name="whole")
    told, (other_waits, waits) = dict[int, int](), os.pipe()

    def asks(group: RunGroup) -> None:
        if os.getpid() not in told:
            told[os.getpid()], signalled = os.pipe()
            os.set_blocking(signalled, False)
            signal.set_wakeup_fd(signalled)
        if group.heads.step == 11:
            if group.config.head.ratio == 0.25:
                os.read(other_waits, 1)
                os.kill(os.getppid(), number)
            else:
                os.write(waits, b".")
            os.kill(os.getpid(), number)  # as terminals and schedulers do
            os.read(told[os.getpid()], 1)  # no group ends before it gets the signal

    interrupted = pytest.raises(Stopped, match=r"in epoch \d of 3; run the same command again to resume")
    with after_each_batch(asks), interrupted as stopped:
        run_sweep(tiny, ratios=[0.25, 0.5])
    assert stopped.value.code == code
    out = tiny.run.dir.parent / "sweeps" / "direct-psa"
    assert len(list((out / "crews").glob("*.pt"))) == 2
    run_sweep(tiny, ratios=[0.25, 0.5])
    for name in ("ratio-0.25", "ratio-0.5"):
        assert losses(out / name) == losses(path.parent / name)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_killed_sweep_leaves_no_process_and_resumes(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    there, arrives = os.pipe()

    def stays(group: RunGroup) -> None:
        if group.heads.step == 12:
            os.write(arrives, b".")
            signal.pause()

    def sweep() -> None:
        with after_each_batch(stays):
            run_sweep(tiny, ratios=[0.25, 0.5])

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    process = fork(sweep)
    assert os.read(there, 1) + os.read(there, 1) == b".."
    forks = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(forks, timeout=10)
    assert len(forks) == 2
    assert not alive
    out = run_sweep(tiny, ratios=[0.25, 0.5])
    assert json.loads(out.read_text())["trained"] == 2
    assert [len(losses(out.parent / name)) for name in ("ratio-0.25", "ratio-0.5")] == [24, 24]


def test_grid_file_varies_any_field_of_the_head(tiny: Config, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("head.scores: [[question], [random]]\nhead.prior: [flat]\ntrain.lr: [1.0e-3]\n")
    result = json.loads(run_sweep(tiny, grid=grid, name="grid").read_text())
    assert [m["overrides"] for m in result["members"]] == [
        {"head.scores": ["question"], "head.prior": "flat", "train.lr": 0.001},
        {"head.scores": ["random"], "head.prior": "flat", "train.lr": 0.001},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head.name: [psa]", "head.name cannot vary in a sweep"),
        ("store.path: [a, b]", "store.path cannot vary in a sweep; expected one of head.ratio"),
        ("head.levles: [a]", "head.levles cannot vary in a sweep; did you mean head.levels?"),
        ("head.ratio: 0.5", r"head.ratio is 0.5; expected lines such as head.dropout: \[0.0, 0.1\]"),
        ("# all lines are comments", "found no options; expected lines such as"),
        ("- head.ratio", r"found \['head.ratio'\]; expected lines such as"),
        ("train.lr: [0.1]\nhead.ratio: []", r"head.ratio is \[\]; expected lines such as"),
        ("{", "expected a YAML file"),
        ("head.ratio: [0.5]\nhead.ratio: [1.0]", "line 2: key 'head.ratio' is used twice"),
    ],
)
def test_bad_grids_are_refused(tmp_path: Path, text: str, message: str) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_axes(None, None, grid)


def test_a_sweep_without_variation_or_with_bad_values_is_refused(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="nothing varies; give --ratios"):
        run_sweep(tiny)
    with pytest.raises(ConfigError, match=r"in the sweep, head\.ratio is 1\.5; expected a share in \(0, 1\]$"):
        run_sweep(tiny, ratios=[1.5])
    assert capsys.readouterr().err == ""  # the command prints the one line
    with pytest.raises(ConfigError, match=r"--name is '\.\./x'; expected letters"):
        run_sweep(tiny, ratios=[0.5], name="../x")


def test_sweeps_of_runs_with_different_names_share_no_folder(tiny: Config) -> None:
    for name in ("psa für's", "psa fur's", "psa_für's"):
        config = replace(tiny, run=replace(tiny.run, dir=tiny.run.dir.with_name(name)))
        folder = tiny.run.dir.parent / "sweeps" / f"{tiny.data.split}-{name}" / "ratio-0.25"
        other = replace(config, head=replace(tiny.head, ratio=0.25), train=replace(tiny.train, lr=0.5))
        run_folder.claim(folder, other)
        with pytest.raises(ConfigError, match=rf"-{name}/ratio-0\.25 holds a run with different settings"):
            run_sweep(config, ratios=[0.25])


def test_a_sweep_of_other_settings_needs_another_name(tiny: Config) -> None:
    folder = tiny.run.dir.parent / "sweeps" / "a" / "ratio-0.25"
    run_folder.claim(folder, replace(tiny, head=replace(tiny.head, ratio=0.25), train=replace(tiny.train, lr=0.5)))
    with pytest.raises(ConfigError, match=r"train.lr: .*\); use another --name or the original settings"):
        run_sweep(tiny, ratios=[0.25], name="a")
    (folder / "config.yaml").write_text("- psa\n")
    with pytest.raises(ConfigError, match=r"sections of an experiment; use another --name, or delete the folder"):
        run_sweep(tiny, ratios=[0.25], name="a")


@pytest.mark.slow
def test_a_sweep_waits_for_runs_held_by_another_process(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run_sweep(tiny, ratios=[0.25, 0.5], name="whole")
    folder = whole.parent.parent / "shared"
    run = folder / "ratio-0.5"
    with held(run, sweep, lambda: shutil.copytree(whole.parent / "ratio-0.5", run, dirs_exist_ok=True)):
        result = json.loads(run_sweep(tiny, ratios=[0.25, 0.5], name="shared").read_text())
    assert (result["planned"], result["trained"], len(result["members"])) == (2, 1, 2)
    out = capsys.readouterr().out
    line = (
        f"sweep shared: waiting for 1 run that other processes train: run folder {folder}/ratio-0.5 is held by process "
    )
    assert out.count(line) == 1
    assert not list((folder / "crews").iterdir())


def test_runs_that_another_process_trains_meanwhile_with_other_settings_are_refused(tiny: Config) -> None:
    other = run_sweep(replace(tiny, train=replace(tiny.train, lr=0.5)), ratios=[0.5], name="other").parent
    run = other.parent / "shared" / "ratio-0.5"
    refused = pytest.raises(ConfigError, match=r"with different settings \(train.lr: .*\); use another --name")
    with held(run, sweep, lambda: shutil.copytree(other / "ratio-0.5", run, dirs_exist_ok=True)), refused:
        run_sweep(tiny, ratios=[0.5], name="shared")


@pytest.mark.slow
def test_a_run_that_another_process_releases_is_trained(tiny: Config) -> None:
    folder = tiny.run.dir.parent / "sweeps" / "shared"
    with held(folder / "ratio-0.5", sweep):
        result = json.loads(run_sweep(tiny, ratios=[0.25, 0.5], name="shared").read_text())
    assert (result["trained"], len(result["members"])) == (2, 2)


def test_the_file_of_a_group_killed_before_its_first_save_does_not_stay(tiny: Config) -> None:
    groups = tiny.run.dir.parent / "sweeps" / "killed" / "crews"
    groups.mkdir(parents=True)
    (groups / "a.json").write_text('["ratio-0.1", "ratio-0.5"]')
    (groups / "b.json").write_text('["ratio-0.1"]')
    run_sweep(tiny, ratios=[0.5], name="killed")
    assert [path.name for path in groups.iterdir()] == ["b.json"]


def test_a_group_file_removed_by_another_process_is_ignored(tiny: Config, tmp_path: Path) -> None:
    run = with_run(tiny, "a")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")  # listed, and not there once it is opened
    (plan,) = sweep.plan_groups([run], tmp_path, torch.device("cpu"), cores=1)
    assert plan.configs == [run]


@pytest.mark.slow
@pytest.mark.parametrize("starts", [2, 4])
def test_simultaneous_starts_end_with_the_results_of_one(starts: int, tmp_path: Path) -> None:
    """A tenth of the benchmark's rounds, in a process of its own because the benchmark forks."""
    rounds = {2: 6, 3: 2, 4: 2}[starts]
    options = [
        "--rounds",
        str(rounds),
        "--starts",
        str(starts),
        "--seed",
        str(starts),
        "--out",
        str(tmp_path / "r.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "train", "bench", "double_starts", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["passed"] == rounds


@pytest.mark.slow
def test_disk_residency_reads_once_for_run_groups_of_different_shapes(tiny: Config, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("head.coarse: [true, false]\n")
    on_disk = with_run(tiny, "psa", train_residency="disk", train_epochs=1)
    one = json.loads(run_sweep(on_disk, ratios=[0.5], name="one").read_text())
    two = json.loads(run_sweep(on_disk, grid=grid, name="two").read_text())
    # Each head measures its inputs on the same few clips; what it trains on is read once for both.
    assert two["trained"] == 2
    assert two["bytes_read"] < 1.6 * one["bytes_read"]


def change_answers(config: Config, part: str, keep: int | None = None) -> None:
    """Swap yes and no in the annotations of a part, and keep the first `keep` questions."""
    path = config.data.root / "qa" / "direct" / f"formatted_{part}_qas_encode.json"
    questions = json.loads(path.read_text())
    other = {"yes": "no", "no": "yes"}
    for question in questions[1:]:  # the first ones decide the order of the answers
        question["answer"] = other.get(question["answer"], question["answer"])
    path.write_text(json.dumps(questions[:keep]))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val"])
def test_runs_trained_on_different_annotations_cannot_share_a_sweep(tmp_path: Path, part: str) -> None:
    config = with_run(write_tiny(tmp_path), "psa", train_epochs=1)
    folder = run_sweep(config, seeds=[0]).parent
    change_answers(config, part)
    changed = rf"\(.*{part} questions: \d+ then and now, but not the same ones or not in the same order\)"
    message = rf"seed-0 was trained on different data {changed}, but all runs of a sweep must share their data; restore"
    with pytest.raises(RunError, match=message):
        run_sweep(config, seeds=[0, 1])
    (folder / "seed-0" / "questions.json").write_text('{"answers": 8}')
    with pytest.raises(RunError, match=r"questions\.json is damaged \(found 8; expected an object with 'n'\)"):
        run_sweep(config, seeds=[0, 1])
    (folder / "seed-0" / "questions.json").unlink()  # as in a run of an earlier version
    assert json.loads(run_sweep(config, seeds=[0, 1]).read_text())["trained"] == 1
    change_answers(config, part)
    run_sweep(config, seeds=[2])
    message = rf"seed-2 and .*seed-1 were trained on different data \(different: .*{part} questions\), but all runs of"
    with pytest.raises(RunError, match=message):
        run_sweep(config, seeds=[0, 1, 2])


def test_runs_and_points_are_scored_against_the_current_annotations(tmp_path: Path) -> None:
    config = with_run(write_tiny(tmp_path), "psa", train_epochs=1)
    before = json.loads(run_sweep(config, seeds=[0, 1]).read_text())
    change_answers(config, "test")
    after = json.loads(run_sweep(config, seeds=[0, 1]).read_text())
    for result in (before, after):
        for column in ("open", "binary", "all"):
            mean = sum(run[column] for run in result["members"]) / 2
            assert result["points"][0][column]["mean"] == pytest.approx(mean)
    assert [run["binary"] for run in after["members"]] == [100 - run["binary"] for run in before["members"]]
    assert [run["n"] for run in after["members"]] == [64, 64]
    change_answers(config, "test", keep=60)
    message = (
        r"seed-0 does not answer these test questions \(.*predictions\.jsonl:61: question_id .* and 3 more\); "
        r"they have changed since it was evaluated, or the file is damaged; evaluate it again: "
        r"egopatch train evaluate --config .*seed-0/config\.yaml"
    )
    with pytest.raises(RunError, match=message):
        run_sweep(config, seeds=[0, 1])
    for seed in (0, 1):
        evaluate(load_config(config.run.dir.parent / f"sweeps/direct-psa/seed-{seed}/config.yaml"))
    assert json.loads(run_sweep(config, seeds=[0, 1]).read_text())["points"][0]["all"]["n"] == 60


def test_the_summary_states_verdicts_and_the_seeds_needed() -> None:
    number = {"mean": 50.0, "low": 45.0, "high": 55.0}
    points = [
        {"setting": {"head.ratio": r}, "seeds": [0, 1], "open": None, "binary": None, "all": number} for r in (0.1, 1)
    ]
    pair = {"setting": points[1]["setting"], "against": points[0]["setting"], "difference": 1.0, "low": -4.0}
    pair |= {"high": 6.0, "p": 0.6, "verdict": "cannot be told apart"}
    needed = {"1": None, "3": 21, "5": 8}
    lines = describe({"points": points, "comparisons": [pair], "seeds_needed": needed})
    assert lines[-2] == ("  head.ratio 1 against head.ratio 0.1: +1.00 [-4.00, +6.00], cannot be told apart (p 0.6000)")
    assert (
        lines[-1]
        == "  seeds needed to find a difference 4 times in 5, by its size in points: 1: more clips, 3: 21, 5: 8"
    )
    assert len(describe({"points": points, "comparisons": [], "seeds_needed": None})) == 2


@pytest.mark.slow
def test_results_have_intervals_and_comparisons(tiny: Config) -> None:
    path = run_sweep(tiny, ratios=[0.25, 1.0], seeds=[0, 1], name="results")
    result = json.loads(path.read_text())
    assert [(point["ratio"], point["seeds"]) for point in result["points"]] == [(0.25, [0, 1]), (1.0, [0, 1])]
    for point in result["points"]:
        of_seeds = [member["all"] for member in result["members"] if member["ratio"] == point["ratio"]]
        assert point["all"]["mean"] == pytest.approx(np.mean(of_seeds))
        assert point["all"]["low"] <= point["all"]["mean"] <= point["all"]["high"]
        assert point["all"]["n"] == point["open"]["n"] + point["binary"]["n"] == 64
    (pair,) = result["comparisons"]
    assert pair["difference"] == pytest.approx(result["points"][1]["all"]["mean"] - result["points"][0]["all"]["mean"])
    assert 0 < pair["p"] <= 1
    assert pair["verdict"] in ("above", "below", "cannot be told apart")
    assert result["seeds_needed"].keys() == {"1", "3", "5"}
    with (path.parent / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["head.ratio"], row["seeds"], row["all_n"]) for row in rows] == [
        ("0.25", "2", "64"),
        ("1.0", "2", "64"),
    ]
    assert float(rows[0]["all_low"]) == pytest.approx(result["points"][0]["all"]["low"], abs=1e-3)
    assert (path.parent / "sweep.png").read_bytes().startswith(b"\x89PNG")
