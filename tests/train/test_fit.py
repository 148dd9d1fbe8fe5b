"""Training: determinism, its commands, what a run's folder holds."""

import dataclasses
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from egopatch.configs.schema import Config, ConfigError
from egopatch.features.tools.derive import derive
from egopatch.train.__main__ import main
from egopatch.train.data.batch import Batch
from egopatch.train.explanation.explain import explain
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.predict import predict_clips
from egopatch.train.fitting.run import system_name
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.rundir.run_folder import RunError, plain
from egopatch.train.sweeps.sweep import run_sweep
from tests.train.tiny import FIELDS, events, losses, same_weights, with_run, written

ROOT = Path(__file__).parents[2]


def test_run_folder_is_complete(tiny: Config) -> None:
    tiny = with_run(tiny, "psa", train_lr=3e-4)  # learns for more than one epoch
    metrics = fit(tiny, "the command")
    run = tiny.run.dir
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "clips.json", "questions.json", "log.jsonl", "tb", "best.safetensors", "card.json", "last.pt",
        "test.json", "predictions.jsonl", "selection.npz", "leases",
    }  # fmt: skip
    card = json.loads((run / "card.json").read_text())
    assert card["fingerprint"] == FIELDS
    assert card["command"] == "the command"
    vals = events(run, "val")
    assert card["val"]["all"] == max(event["all"] for event in vals)
    assert card["best_epoch"] == next(e["epoch"] for e in vals if e["all"] == card["val"]["all"])
    (converged,) = events(run, "converged")
    assert converged["steps"] == next(e["step"] for e in vals if e["all"] >= 0.95 * card["val"]["all"])
    assert converged["steps"] > vals[0]["step"]
    assert 0 < converged["seconds"] < 60
    test = json.loads((run / "test.json").read_text())
    assert 0 <= test["wrong_form"] <= test["all"]["n"]
    assert (test["model"], test["split"], test["seed"]) == ("psa", "direct", 0)
    assert test["all"] == dataclasses.asdict(metrics.all)
    assert test["all"]["n"] == len((run / "predictions.jsonl").read_text().splitlines())
    with np.load(run / "selection.npz") as selection:
        assert selection["kept"].shape == (test["all"]["n"], 2, 6)
        assert selection["kept"].dtype == np.int16
        assert len(selection["question_ids"]) == test["all"]["n"]
    assert list((run / "tb").glob("events.*"))


@pytest.mark.slow
def test_scoring_the_predictions_gives_the_test_result(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny, "x")
    capsys.readouterr()
    questions = tiny.data.root / "qa" / "direct" / "formatted_test_qas_encode.json"
    predictions = tiny.run.dir / "predictions.jsonl"
    assert main(["score", "--questions", str(questions), "--predictions", str(predictions), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    test = json.loads((tiny.run.dir / "test.json").read_text())
    assert printed == {name: test[name] for name in printed}


def test_the_log_names_the_implementation_of_select_attend(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for implementation, why in (("auto", "tokens are on cpu"), ("reference", "as requested")):
        config = with_run(tiny, implementation, head_implementation=implementation, train_epochs=1, train_device="cpu")
        fit(config, "")
        assert f"select_attend: reference ({why})" in capsys.readouterr().out
        expected = {"event": "select_attend", "step": 0, "implementation": "reference", "why": why}
        assert events(config.run.dir)[0] == expected
    with pytest.raises(ConfigError, match=r"head.implementation is triton: .* or use 'auto'"):
        fit(with_run(tiny, "triton", head_implementation="triton", train_device="cpu"), "")


def test_same_seed_same_losses_and_weights(tiny: Config) -> None:
    other = with_run(tiny, "again")
    fit(tiny, "x")
    fit(other, "x")
    assert losses(tiny.run.dir) == losses(other.run.dir)
    assert same_weights(tiny, other)
    third = with_run(tiny, "seed1", train_seed=1)
    fit(third, "x")
    assert losses(third.run.dir) != losses(tiny.run.dir)


@pytest.mark.slow
def test_training_keeps_the_callers_random_state_and_thread_count(tiny: Config) -> None:
    config = with_run(tiny, "psa", train_epochs=1)
    torch.manual_seed(5)
    expected, others, threads = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for work in (
            lambda: fit(config, "x"),
            lambda: fit(config, "evaluates it again"),
            lambda: evaluate(config),
            lambda: explain(config, 4),
            lambda: predict_clips(config, ["clip|P0|0|1"], "what colour is the left thing?"),
            lambda: run_sweep(config, ratios=[0.5], name="one"),
        ):
            work()
            assert torch.equal(torch.get_rng_state(), expected)
            assert torch.get_num_threads() == 3
        with pytest.raises(RunError):
            fit(with_run(tiny, "diverges", train_lr=1e30), "x")
        assert torch.equal(torch.get_rng_state(), expected)
    finally:
        torch.set_num_threads(threads)
    assert random.getstate() == others


def test_deterministic_training_sets_the_cublas_workspace(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    open_experiment(tiny)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    open_experiment(with_run(tiny, "exact", train_deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_cpu_training_enables_deterministic_algorithms(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without this mode, threads add up the gradients of indexed tensors in any order, from 32,768 numbers on.
    real, modes = RunGroup.learn, []

    def learn(self: RunGroup, batch: Batch, last: bool) -> None:
        modes.append(torch.are_deterministic_algorithms_enabled())
        real(self, batch, last)

    monkeypatch.setattr(RunGroup, "learn", learn)
    fit(with_run(tiny, "psa", train_epochs=1), "x")
    assert modes == [True] * 8
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_stops_after_patience_epochs_without_val_improvement(tiny: Config) -> None:
    patient, plain_run = with_run(tiny, "patient", train_epochs=12, train_patience=2, train_lr=1e-6), tiny
    fit(patient, "x")
    vals = [event["all"] for event in events(patient.run.dir, "val")]
    best = vals.index(max(vals))
    assert len(vals) == min(12, best + 1 + 2)
    assert len(vals) < 12
    assert json.loads((patient.run.dir / "card.json").read_text())["best_epoch"] == best + 1
    fit(plain_run, "x")
    assert len(losses(plain_run.run.dir)) == 24


def test_a_derived_store_trains_with_the_losses_of_its_parent(tiny: Config, tmp_path: Path) -> None:
    by_saliency = with_run(tiny, "full", head_scores=("saliency",), head_ratio=0.25, head_coarse=False)
    derive(tiny.store.path, tmp_path / "small", keep=0.25)
    small = with_run(by_saliency, "small", store_path=tmp_path / "small")
    whole, part = fit(by_saliency, "x"), fit(small, "x")
    # Kept patches are stored in another order there, so sums round differently.
    np.testing.assert_allclose(losses(small.run.dir), losses(by_saliency.run.dir), rtol=1e-4)
    assert part.all.accuracy == pytest.approx(whole.all.accuracy, abs=2)
    with np.load(small.run.dir / "selection.npz") as here, np.load(by_saliency.run.dir / "selection.npz") as there:
        assert np.array_equal(here["kept"], there["kept"])
    # Its prior uses the original patch positions.
    with_prior = with_run(small, "prior", head_scores=("saliency", "prior"), head_growth=True, train_epochs=1)
    fit(with_prior, "x")
    assert load_file(with_prior.run.dir / "best.safetensors")["prior"].shape == (12,)
    with pytest.raises(ConfigError, match=r"head\.ratio 0\.5 with .* keeps 6 of 12 patches a frame, but the store"):
        fit(with_run(small, "more", head_ratio=0.5), "x")
    with pytest.raises(ConfigError, match=r"head\.coarse is true but the store has 3 of 12 patches"):
        fit(with_run(small, "coarse", head_coarse=True), "x")


@pytest.mark.parametrize("mask", [0o002, pytest.param(0o027, marks=pytest.mark.slow)])
def test_the_files_of_runs_and_sweeps_follow_the_umask(tiny: Config, mask: int) -> None:
    former = os.umask(mask)
    try:
        fit(tiny, "x")
        run_sweep(tiny, ratios=[0.5])
    finally:
        os.umask(former)
    files = [path for path in tiny.run.dir.parent.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "best.safetensors",
        "last.pt",
        "sweep.json",
        "sweep.csv",
        "sweep.png",
        "lock",
    }
    assert {path: oct(path.stat().st_mode & 0o777) for path in files} == {path: oct(0o666 & ~mask) for path in files}


def test_answers_absent_from_training_are_noted(tiny: Config, tmp_path: Path) -> None:
    assert "training answers" not in "".join(open_experiment(tiny).data_lines)
    other = with_run(tiny, "other", data_root=shutil.copytree(tiny.data.root, tmp_path / "data"))
    path = other.data.root / "qa/direct/formatted_test_qas_encode.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([{**records[0], "answer": "Violet"}, *records[1:]]))
    line = open_experiment(other).data_lines[-1]
    count, most = len(records), 100 * (1 - 1 / len(records))
    assert line == (
        f"note: the answers of 1 of {count} test questions, such as 'Violet', are not among the training answers, so "
        f"no head can give them: accuracy is at most {most:.2f}"
    )


def test_blind_heads_read_no_video_and_majority_needs_no_store(tiny: Config, tmp_path: Path) -> None:
    metrics = fit(with_run(tiny, "majority", head_name="majority", store_path=tmp_path / "nowhere"), "x")
    records = json.loads((tiny.data.root / "qa" / "direct" / "formatted_train_qas_encode.json").read_text())
    tests = json.loads((tiny.data.root / "qa" / "direct" / "formatted_test_qas_encode.json").read_text())
    right = 0
    for form in ("query", "verify"):
        answers = [r["answer"] for r in records if r["structural"] == form]
        most = max(set(answers), key=answers.count)
        right += sum(r["structural"] == form and r["answer"] == most for r in tests)
    assert metrics.all.accuracy == pytest.approx(100 * right / len(tests))
    fit(with_run(tiny, "blind", head_name="question-only"), "x")
    assert json.loads((tiny.run.dir.parent / "blind" / "card.json").read_text())["fingerprint"] is None
    names = [system_name(with_run(tiny, "x", head_name=name, encoder_arch="lite")) for name in ("question-only", "psa")]
    assert names == ["question-only", "psa (lite)"]


@pytest.mark.slow
def test_training_imports_no_video_library(tiny: Config) -> None:
    path = written(with_run(tiny, "imports", train_epochs=1))
    script = (
        "import sys; from egopatch.train.__main__ import main; code = main(['fit', '--config', sys.argv[1]]);"
        "found = {'av', 'transformers'} & set(sys.modules); print(found); sys.exit(code or len(found))"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fit_and_evaluate_commands_return_the_right_exit_codes(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my c.yaml"
    path.write_text(yaml.safe_dump(plain(tiny)))
    options = ["--config", str(path), "--train.epochs", "1"]
    assert main(["fit", *options]) == 0
    card = json.loads((tiny.run.dir / "card.json").read_text())
    assert shlex.split(card["command"]) == ["egopatch", "train", "fit", *options]
    printed = capsys.readouterr().out
    assert "psa on the direct test questions: open" in printed
    assert "run.table" not in printed
    assert main(["fit", *options, "--run.table", str(tmp_path / "tables")]) == 0
    assert f"note: run.dir {tiny.run.dir} is not below run.table, {tmp_path / 'tables'}, so" in capsys.readouterr().out
    assert main(["evaluate", "--config", str(path)]) == 0
    assert main(["fit", "--config", str(path), "--head.ratio", "1.0"]) == 2
    assert "train fit: error: run.dir" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--head.ratoi", "1.0"])
    assert stopped.value.code == 2
    assert "did you mean head.ratio?" in capsys.readouterr().err
    assert (
        main(["fit", "--config", str(path), "--data.root", str(tmp_path / "no"), "--run.dir", str(tmp_path / "r")]) == 2
    )
    assert (
        main(["fit", "--config", str(path), "--store.path", str(tmp_path / "no"), "--run.dir", str(tmp_path / "s")])
        == 1
    )
    assert main(["fitt"]) == 2
    assert "unknown command 'fitt'; choose one of fit, evaluate" in capsys.readouterr().err
