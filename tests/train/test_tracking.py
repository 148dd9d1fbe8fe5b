"""Experiment trackers: stand-ins of their modules get the numbers of the log, and a run that resumes stays one run."""

import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from egopatch.configs.schema import Config, ConfigError
from egopatch.train.fitting.fit import fit
from egopatch.train.rundir.log import RunLog
from egopatch.train.rundir.names import BOARD
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.rundir.tracking import open_tracker
from tests.features.faults import limited
from tests.train.tiny import events, with_run

Calls = list[tuple[str, Any]]


def wandb(calls: Calls) -> ModuleType:
    """The part of the Weights & Biases API that is used."""

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "new",
            define_metric=lambda *names, **options: calls.append(("axis", options["step_metric"])),
            log=lambda values: calls.append(("log", values)),
            finish=lambda: calls.append(("finish", None)),
        )

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    return module


def mlflow(calls: Calls) -> ModuleType:
    """The part of the MLflow API that is used."""
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: calls.append(("experiment", name)) or "7",
        create_run=lambda experiment, run_name: (
            calls.append(("init", experiment)) or SimpleNamespace(info=SimpleNamespace(run_id="new"))
        ),
        update_run=lambda run, status: calls.append(("init", run)),
        log_param=lambda run, name, value: calls.append(("param", (name, value))),
        log_batch=lambda run, metrics: [calls.append(("log", {"step": m[3], m[0]: m[1]})) for m in metrics],
        set_terminated=lambda run: calls.append(("finish", None)),
    )
    module = ModuleType("mlflow")
    module.entities = SimpleNamespace(Metric=lambda *values: values)  # type: ignore[attr-defined]
    module.MlflowClient = lambda: client  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=[wandb, mlflow], ids=lambda make: make.__name__)
def tracked(request: pytest.FixtureRequest, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Calls]:
    make: Callable[[Calls], ModuleType] = request.param
    calls: Calls = []
    monkeypatch.setitem(sys.modules, make.__name__, make(calls))
    return with_run(tiny, "tracked", train_epochs=1, run_tracker=make.__name__), calls


def test_trackers_receive_the_log_and_a_resumed_run_stays_one_run(tracked: tuple[Config, Calls]) -> None:
    config, calls = tracked
    fit(config, "train fit")
    numbers = {
        (line["step"], f"{line['event']}/{name}", value)
        for line in events(config.run.dir)
        for name, value in line.items()
        if isinstance(value, float)
    }
    sent = {
        (values["step"], name, value)
        for kind, values in calls
        if kind == "log"
        for name, value in values.items()
        if name != "step"
    }
    assert sent == numbers
    assert any(name == "val/all" for _, name, _ in sent)
    assert calls[-1][0] == "finish"
    (config.run.dir / "test.json").unlink()
    fit(config, "train fit")
    first, second = (value for kind, value in calls if kind == "init")
    assert second != first
    assert second == "new" or second["id"] == "new"


def test_a_failing_tracker_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the server is gone")

    log = RunLog(tmp_path, 0, SimpleNamespace(log=fail, close=fail))
    for step in (1, 2):
        log.write("step", step, loss=0.5)
    log.close()
    assert capsys.readouterr().err == "run.tracker failed, and the run continues without it: the server is gone\n"
    assert (tmp_path / "log.jsonl").read_text().count("loss") == 2


def test_a_run_starts_and_resumes_without_its_tracker(
    tracked: tuple[Config, Calls], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route to host")

    config, calls = tracked
    for name, first in (("wandb", "init"), ("mlflow", "MlflowClient")):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], first, fail, raising=False)
    fit(config, "train fit")
    expected = "run.tracker failed, and the run continues without it: no route to host\n"
    assert expected in capsys.readouterr().err
    (config.run.dir / "test.json").unlink()
    fit(config, "train fit")
    assert expected in capsys.readouterr().err
    assert not calls


def test_a_damaged_record_of_the_tracker_is_named(tracked: tuple[Config, Calls]) -> None:
    config, _ = tracked
    for damaged in ("{", "[]"):
        record = config.run.dir / "tracking.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(damaged)
        with pytest.raises(RunError, match=r"tracking\.json is damaged \(.*\); delete it to log to a new run"):
            open_tracker(str(config.run.tracker), config.run.dir, {})


def test_a_tracker_that_is_not_installed_is_named(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run.tracker is 'wandb', .* run: pip install 'egopatch\[wandb\]'"):
        fit(with_run(tiny, "tracked", run_tracker="wandb"), "train fit")


def test_tensorboard_reads_the_numbers_of_a_run_that_resumed(tmp_path: Path) -> None:
    for resumed_after, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = RunLog(tmp_path, resumed_after)
        for step in steps:
            log.write("step", step, loss=1 / step + resumed_after)
        log.close()
    board = EventAccumulator(str(tmp_path / BOARD)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("step/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(2 + 1 / 3)),
        (4, 2.25),
    ]


def test_a_disk_that_is_full_for_tensorboard_is_an_error_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    with limited(resource.RLIMIT_FSIZE, 20), pytest.raises(OSError, match="File too large"):
        RunLog(tmp_path, 0)
    assert printed == []
