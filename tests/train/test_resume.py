"""Killed, interrupted or abandoned runs resume, and runs held by another process are waited for."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from egopatch.configs.schema import Config, ConfigError
from egopatch.features.io import file_lease
from egopatch.interrupt import ignore_repeated
from egopatch.train.__main__ import main
from egopatch.train.data.batch import Batch
from egopatch.train.fitting.answers import Answers
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.heads import Head, Sizes
from egopatch.train.heads.registry import _PLUGINS as HEADS
from egopatch.train.processes.stopping import Stopped
from egopatch.train.rundir import lease
from egopatch.train.rundir.resume import ResumeState
from egopatch.train.rundir.run_folder import RunError, plain
from tests.train.kills import Killed, after_each_batch, held, killed_after
from tests.train.tiny import FIELDS, clock, events, losses, same_weights, with_run, write_tiny, written

ROOT = Path(__file__).parents[2]


def stop_after(config: Config, due: Callable[[RunGroup], bool], number: int = signal.SIGINT) -> str:
    """Train until `due`, then raise a signal; returns the message of the run."""
    with after_each_batch(lambda group: due(group) and signal.raise_signal(number)), pytest.raises(Stopped) as stopped:
        fit(config, "x")
    return str(stopped.value)


@pytest.mark.parametrize(
    ("step", "accumulate"),
    [(7, 3), *(pytest.param(step, 1, marks=pytest.mark.slow) for step in (1, 12, 16, 23))],
)
def test_a_killed_and_resumed_run_has_the_same_losses(tiny: Config, step: int, accumulate: int) -> None:
    tiny = with_run(tiny, "psa", train_accumulate=accumulate, train_ema=0.8 if accumulate > 1 else 0.0)
    undisturbed = with_run(tiny, "undisturbed")
    fit(undisturbed, "x")
    killed_after(step, lambda: fit(tiny, "x"))
    torch.manual_seed(99)  # another process has other random numbers
    fit(tiny, "x")
    assert losses(tiny.run.dir) == losses(undisturbed.run.dir)
    for name in ("predictions.jsonl", "test.json"):
        assert (tiny.run.dir / name).read_text() == (undisturbed.run.dir / name).read_text()


def test_signal_saves_the_place_within_an_epoch(tiny: Config) -> None:
    undisturbed = with_run(tiny, "undisturbed")
    fit(undisturbed, "x")
    said = stop_after(tiny, lambda group: group.heads.step == 11)
    assert said == "interrupted in epoch 2 of 3; run the same command again to resume"
    assert torch.load(tiny.run.dir / "last.pt", weights_only=True)["stack"]["step"] == 11
    fit(tiny, "x")
    assert losses(tiny.run.dir) == losses(undisturbed.run.dir)


def test_ctrl_c_while_the_position_is_saved_is_raised_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def interrupted(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        save(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", interrupted)
    state = ResumeState((0, 1), (), (), {}, None)
    with pytest.raises(KeyboardInterrupt):
        state.write(tmp_path / "last.pt")
    assert ResumeState.read(tmp_path / "last.pt") == state


def test_a_run_resumes_in_a_renamed_folder(tiny: Config) -> None:
    undisturbed, renamed = with_run(tiny, "undisturbed"), with_run(tiny, "renamed")
    fit(undisturbed, "x")
    stop_after(tiny, lambda group: group.heads.step == 11)
    tiny.run.dir.rename(renamed.run.dir)
    fit(renamed, "x")
    assert losses(renamed.run.dir) == losses(undisturbed.run.dir)


def test_a_signal_during_the_last_evaluation_is_not_lost(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunGroup.end_epoch

    def interrupted(self: RunGroup, answers: Sequence[Answers]) -> None:
        if self.position[0] == 2:
            signal.raise_signal(signal.SIGINT)
        real(self, answers)

    monkeypatch.setattr(RunGroup, "end_epoch", interrupted)
    with pytest.raises(Stopped, match=r"^interrupted after the last epoch; run the same command again to resume$"):
        fit(tiny, "x")
    assert not (tiny.run.dir / "test.json").exists()
    steps = len(losses(tiny.run.dir))
    fit(tiny, "x")
    assert len(losses(tiny.run.dir)) == steps


@pytest.mark.usefixtures("closing_terminal")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)],
)
@pytest.mark.parametrize("trains", [False, True])
def test_the_exit_code_asks_a_scheduler_for_another_start(
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
    trains: bool,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    target = "run_group.RunGroup.end_epoch" if trains else "fit.open_experiment"
    monkeypatch.setattr(f"egopatch.train.fitting.{target}", interrupted)
    before = signal.getsignal(number)
    assert main(["fit", "--config", written(tiny)]) == code
    assert capsys.readouterr().err.endswith("; run the same command again to resume\n")
    # Further ones are ignored once an exception has been raised; training only stops after a step.
    assert signal.getsignal(number) is (before if trains or number == signal.SIGINT else ignore_repeated)


def test_a_head_that_makes_no_step_keeps_its_log(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = with_run(tiny, "majority", head_name="majority")

    def dies(*_: object) -> None:
        raise Killed

    real = RunGroup.restore_best
    monkeypatch.setattr(RunGroup, "restore_best", dies)
    with pytest.raises(Killed):
        fit(tiny, "x")
    monkeypatch.setattr(RunGroup, "restore_best", real)
    fit(tiny, "x")
    assert [event["event"] for event in events(tiny.run.dir)] == ["val", "converged", "end"]


def test_a_signal_between_accumulated_batches_loses_no_gradient(tiny: Config) -> None:
    tiny = with_run(tiny, "psa", train_accumulate=3, train_ema=0.8, head_scores=("question", "random"))
    undisturbed = with_run(tiny, "undisturbed")
    fit(undisturbed, "x")
    two_after_a_step = (1, 5)
    stop_after(tiny, lambda group: group.position == two_after_a_step, signal.SIGTERM)
    assert len(torch.load(tiny.run.dir / "last.pt", weights_only=True)["stack"]["held"]) == 2
    fit(tiny, "x")
    assert losses(tiny.run.dir) == losses(undisturbed.run.dir)
    assert same_weights(tiny, undisturbed)


class _Dropped(torch.nn.Module):
    """A head from outside with torch's own dropout and a batch norm."""

    def __init__(self, _: None, sizes: Sizes) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.BatchNorm1d(sizes.width), torch.nn.Dropout(0.5), torch.nn.Linear(sizes.width, sizes.answers)
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.layers(batch.tokens.patches.float().mean((1, 2)))[batch.clip_index]


def test_a_custom_head_resumes_with_the_losses_of_an_undisturbed_run(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS._registered, "dropped", Head("dropped", _Dropped))
    tiny = with_run(tiny, "dropped", head_name="dropped")
    undisturbed = with_run(tiny, "undisturbed")
    fit(undisturbed, "x")
    stop_after(tiny, lambda group: group.heads.step == 11)
    torch.manual_seed(1)
    fit(tiny, "x")
    assert losses(tiny.run.dir) == losses(undisturbed.run.dir)
    assert same_weights(tiny, undisturbed)
    assert load_file(tiny.run.dir / "best.safetensors")["layers.0.running_mean"].any()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda logits: torch.cat([logits, logits], dim=1), r"a tensor \(32, 16\) of torch.float32"),
        (lambda logits: logits[:, 1:], r"a tensor \(32, 7\) of torch.float32"),
        (lambda logits: logits[:, 0], r"a tensor \(32,\) of torch.float32"),
        (lambda logits: logits.argsort(dim=1), r"a tensor \(32, 8\) of torch.int64"),
        (lambda logits: (logits, None), "a tuple"),
    ],
)
def test_a_custom_head_must_return_logits(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, change: Callable, found: str
) -> None:
    class Other(_Dropped):
        def forward(self, batch: Batch) -> torch.Tensor:
            return change(super().forward(batch))

    monkeypatch.setitem(HEADS._registered, "other", Head("other", Other))
    expected = r"expected logits \(32, 8\) of a floating-point type, a row for each question and a column for each of "
    with pytest.raises(
        ConfigError, match=f"the head other returns {found}; {expected}sizes.answers: correct its forward"
    ):
        fit(with_run(tiny, "other", head_name="other"), "x")


@pytest.mark.parametrize("command", [lambda config: fit(config, "x"), evaluate])
def test_fit_and_evaluate_wait_for_a_run_held_by_another_process(
    tiny: Config, capsys: pytest.CaptureFixture[str], command: Callable
) -> None:
    alone = with_run(tiny, "alone")
    expected = fit(alone, "x")
    shutil.copytree(alone.run.dir, tiny.run.dir, ignore=shutil.ignore_patterns("test.json"))
    with held(tiny.run.dir, lease, lambda: shutil.copy(alone.run.dir / "test.json", tiny.run.dir)) as slept:
        assert command(tiny) == expected
    assert slept == [lease.POLL_S] * 3
    out = capsys.readouterr().out
    assert out.count(f"waiting: run folder {tiny.run.dir} is held by process {os.getpid()} on ") == 1
    assert "or stop it: its lease then expires automatically" in out


def test_what_another_process_wrote_during_the_wait_is_checked(tiny: Config) -> None:
    other = with_run(tiny, "other", train_seed=1)
    fit(other, "x")

    def waiting(into: Config, command: Callable[[], object]) -> None:
        with held(into.run.dir, lease, lambda: shutil.copytree(other.run.dir, into.run.dir, dirs_exist_ok=True)):
            command()

    with pytest.raises(ConfigError, match=r"with different settings \(train.seed: folder has 1, requested 0\)"):
        waiting(tiny, lambda: fit(tiny, "x"))
    elsewhere = with_run(tiny, "elsewhere")
    with pytest.raises(RunError, match=r"holds a head that was trained there; use another --run.dir"):
        waiting(elsewhere, lambda: evaluate(elsewhere, source=other.run.dir))
    for config in (tiny, elsewhere):
        assert (config.run.dir / "card.json").read_bytes() == (other.run.dir / "card.json").read_bytes()


def test_a_run_that_another_process_releases_is_trained(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tiny.run.dir, lease):
        fit(tiny, "x")
    assert "train psa direct: 24 steps" in capsys.readouterr().out


def test_ctrl_c_while_waiting_prints_one_line(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "time", clock(lambda seconds: signal.raise_signal(signal.SIGINT)))
    with file_lease.hold(tiny.run.dir, 0):
        assert main(["fit", "--config", written(tiny)]) == 130
        assert [path.name for path in tiny.run.dir.iterdir()] == ["leases"]
    assert capsys.readouterr().err == "train fit: interrupted; run the same command again to resume\n"


def test_nothing_is_written_by_a_start_that_waits(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.run.dir.mkdir(parents=True)
    (tiny.run.dir / "config.yaml").write_text(yaml.safe_dump(plain(tiny)) + "# another process's\n")
    monkeypatch.setattr(lease, "time", clock(lambda seconds: signal.raise_signal(signal.SIGINT)))
    with file_lease.hold(tiny.run.dir, 0), pytest.raises(KeyboardInterrupt):
        fit(with_run(tiny, "psa", train_residency="ram"), "x")
    assert "# another process's" in (tiny.run.dir / "config.yaml").read_text()
    other = with_run(tiny, "psa", head_ratio=0.25)
    with file_lease.hold(tiny.run.dir, 0), pytest.raises(ConfigError, match=r"with different settings \(head.ratio"):
        fit(other, "x")  # at once


@pytest.mark.slow
def test_a_sigkilled_process_resumes_with_the_same_losses(tiny: Config) -> None:
    """The same with a real process and a real SIGKILL, at whatever step it lands."""
    tiny = with_run(tiny, "psa", train_accumulate=2, train_ema=0.9, train_epochs=6)
    undisturbed = with_run(tiny, "undisturbed")
    fit(undisturbed, "x")
    command = [sys.executable, "-m", "train", "fit", "--config", written(tiny)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    log = tiny.run.dir / "log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 13):
        time.sleep(0.01)  # leaves the cores to the process under test
    process.kill()
    process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert losses(tiny.run.dir) == losses(undisturbed.run.dir)


def _edit(config: Config, part: str, edit: Callable[[list[dict]], list[dict]]) -> None:
    path = config.data.root / "qa" / "direct" / f"formatted_{part}_qas_encode.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


@pytest.fixture
def interrupted(tmp_path: Path) -> Config:
    """A run on data of its own, stopped in its second epoch."""
    config = write_tiny(tmp_path, clips=24)
    stop_after(config, lambda group: group.position == (1, 2))
    return config


SAME = "then and now, but not the same ones or not in the same order"


@pytest.mark.parametrize(
    ("part", "edit", "changed"),
    [
        (
            "train",
            lambda rows: [{**rows[0], "answer": "purple"}, *rows[1:]],
            f"answers: 8 then, 9 now; train questions: 128 {SAME}",
        ),
        ("train", lambda rows: rows[:-16], "train questions: 128 then, 112 now"),
        ("train", lambda rows: rows[8:] + rows[:8], f"train questions: 128 {SAME}"),
        ("val", lambda rows: rows[:8], "val questions: 32 then, 8 now"),
        ("val", lambda rows: [{**rows[0], "answer": "violet"}, *rows[1:]], f"val questions: 32 {SAME}"),
    ],
)
def test_resuming_on_other_questions_is_refused(
    interrupted: Config, part: str, edit: Callable[[list[dict]], list[dict]], changed: str
) -> None:
    _edit(interrupted, part, edit)
    with pytest.raises(RunError) as refused:
        fit(interrupted, "x")
    before, found, after = re.split(r" \((.*)\); ", str(refused.value), maxsplit=1)
    assert before == f"{interrupted.run.dir}/last.pt was saved with different data"
    assert re.sub(rf"^answers: 8 {SAME}; ", "", found) == changed
    assert after == (
        f"to resume, restore the annotations in {interrupted.data.root}, or the store if clips were encoded since; "
        "otherwise delete the file to train from the start"
    )
    (interrupted.run.dir / "last.pt").unlink()
    fit(interrupted, "x")


def test_the_test_questions_may_change_until_training_ends(interrupted: Config) -> None:
    _edit(interrupted, "test", lambda rows: rows[:8])
    assert fit(interrupted, "x").all.n == 8


def test_a_state_without_recorded_questions_resumes_if_its_steps_fit(
    interrupted: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    path = interrupted.run.dir / "last.pt"
    state = torch.load(path, weights_only=True)
    del state["data"]
    torch.save(state, path)
    original = interrupted.data.root / "qa" / "direct" / "formatted_train_qas_encode.json"
    rows = original.read_text()
    _edit(interrupted, "train", lambda rows: rows[: len(rows) // 2])
    with pytest.raises(RunError, match=r"different data \(its 6 steps up to batch 2 of epoch 2 do not match the qu"):
        fit(interrupted, "x")
    original.write_text(rows)
    _edit(interrupted, "train", lambda rows: [{**rows[0], "answer": "purple"}, *rows[1:]])
    with pytest.raises(
        RunError, match=r"a head of another shape \(.*: \(8,.*\) then, \(9,.*\) now\); to resume, restore the ans"
    ):
        fit(interrupted, "x")
    original.write_text(rows)
    capsys.readouterr()
    fit(interrupted, "x")
    assert (
        "which did not record the answers and questions; if the annotations have changed since"
        in capsys.readouterr().out
    )


def test_resuming_on_other_features_is_refused(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egopatch.train.fitting.fit.evaluate_groups", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        fit(tiny, "x")
    other = write_tiny(tmp_path / "other", fields={**FIELDS, "checkpoint": "another"})
    with pytest.raises(RunError, match="was saved with different features"):
        fit(with_run(tiny, "psa", store_path=other.store.path), "x")
