"""Failing training stops with one line, keeps its last state, and never saves wrong weights."""

import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Dataset, load_dataset
from egopatch.extract.datasets.records import UNKNOWN_ANSWERS
from egopatch.extract.datasets.registry import _PLUGINS as DATASETS
from egopatch.train.__main__ import main
from egopatch.train.data.batch import Batch
from egopatch.train.fitting import experiment, run_group
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.rundir.run_folder import RunError, save_weights, weights_epoch
from egopatch.train.steps.stacked_heads import StackedHeads
from egopatch.train.sweeps.sweep import run_sweep
from tests.features.faults import limited
from tests.train.kills import after_each_batch, killed_after
from tests.train.tiny import events, losses, same_weights, with_run, written


def weights_of(config: Config) -> dict[str, Tensor]:
    return load_file(config.run.dir / "best.safetensors")


def same(here: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


@pytest.fixture
def config_file(tiny: Config) -> str:
    return written(tiny)


def test_a_loss_that_is_not_finite_ends_the_run(
    tiny: Config, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["fit", "--config", config_file, "--train.lr", "1e30"]) == 1
        assert re.fullmatch(
            rf"train fit: failed: {tiny.run.dir}: (the loss|the norm of the gradient) is (nan|inf) in epoch 1, "
            r"step \d of 24, at learning rate [\d.]+e\+\d\d; try a lower --train\.lr \(such as 3e\+29\) or a longer "
            r"--train\.warmup, in another --run\.dir\n",
            capsys.readouterr().err,
        )
    names = {path.name for path in tiny.run.dir.iterdir()}
    assert names == {"config.yaml", "clips.json", "questions.json", "log.jsonl", "tb", "leases"}
    assert events(tiny.run.dir)[-1]["event"] == "failed"


def test_weights_that_are_not_finite_are_never_the_best(tiny: Config) -> None:
    def diverges(group: RunGroup) -> None:
        if group.heads.step == 8:  # the last one of the first epoch: no loss shows it before val
            next(iter(group.heads.tensors.values())).data[0] = float("inf")

    message = r"psa: a weight is not finite in epoch 1, step 8 of 24, at learning rate 0\.00"
    with after_each_batch(diverges), pytest.raises(RunError, match=message):
        fit(tiny, "x")
    assert not (tiny.run.dir / "best.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("ema", "read_together"), [(0.0, 1), (0.9, 5)])
def test_a_failed_run_of_a_stack_does_not_affect_the_others(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, ema: float, read_together: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one stack
    monkeypatch.setitem(run_group.STEPS_READ_TOGETHER, "cpu", read_together)
    tiny = with_run(tiny, "psa", train_ema=ema)
    whole = run_sweep(tiny, ratios=[0.25, 0.5], name="whole")
    real = StackedHeads._losses

    def diverges(self: StackedHeads, batch: Batch) -> Tensor:
        found = real(self, batch)
        # Once the failure has been read, the run has only finite values. An epoch, whose last step is read, has 8.
        assert self.step <= min(10 + read_together, 15) or found.isfinite().all()
        return found * torch.tensor([[1.0], [float("nan")]]) if self.step == 11 and len(self) == 2 else found

    monkeypatch.setattr(StackedHeads, "_losses", diverges)
    message = (
        r"1 of 2 runs has no results in .*/sweeps/faulty/sweep\.json: .*/faulty/ratio-0\.5: the loss is nan in epoch "
        r"2, step 12 of 24, at learning rate 0\.002\d?; try a lower --train\.lr \(such as 0\.001\)"
    )
    with pytest.raises(RunError, match=message):
        run_sweep(tiny, ratios=[0.25, 0.5], name="faulty")
    folder = whole.parent.parent / "faulty"
    assert losses(folder / "ratio-0.25") == losses(whole.parent / "ratio-0.25")
    weights = (load_file(out / "ratio-0.25" / "best.safetensors") for out in (whole.parent, folder))
    assert same(*weights)
    result, expected = (json.loads((out / "sweep.json").read_text()) for out in (folder, whole.parent))
    assert result["members"] == expected["members"][:1]
    assert list(result["failed"]) == ["ratio-0.5"]
    assert not (folder / "ratio-0.5" / "test.json").exists()
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "ratio-0.5" / "best.safetensors").values())
    assert not list((folder / "crews").iterdir())
    # The next start trains it alone.
    monkeypatch.setattr(StackedHeads, "_losses", real)
    assert json.loads(run_sweep(tiny, ratios=[0.25, 0.5], name="faulty").read_text())["trained"] == 1


@pytest.mark.slow
def test_a_stack_remembers_its_failed_run_after_an_interruption(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    real = StackedHeads._losses

    def diverges(self: StackedHeads, batch: Batch) -> Tensor:
        found = real(self, batch)
        return found * torch.tensor([[1.0], [float("inf")]]) if self.step == 3 else found

    monkeypatch.setattr(StackedHeads, "_losses", diverges)
    killed_after(9, lambda: run_sweep(tiny, ratios=[0.25, 0.5]))
    with pytest.raises(RunError, match=r"1 of 2 runs has no results in .* is (inf|nan) in epoch 1, step 4 of 24"):
        run_sweep(tiny, ratios=[0.25, 0.5])


def test_a_sweep_with_a_failed_run_exits_with_1(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("train.lr: [3.0e-3, 1.0e+30]\n")
    assert main(["sweep", "--config", config_file, "--grid", str(grid)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("train sweep: failed: 1 of 2 runs has no results in ")
    assert captured.err.endswith("or a longer --train.warmup, in a sweep with another --name\n")
    assert captured.err.count("\n") == 1
    assert "train.lr 0.003: open" in captured.out


def test_weights_newer_than_the_saved_state_are_rolled_back(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = with_run(tiny, "undisturbed")
    fit(undisturbed, "x")
    best = json.loads((undisturbed.run.dir / "card.json").read_text())["best_epoch"]
    assert weights_epoch(undisturbed.run.dir) == best
    killed_after(9, lambda: fit(tiny, "x"))
    first = weights_of(tiny)
    assert weights_epoch(tiny.run.dir) == 1
    # As if epoch 2 had been the best before the kill. On a GPU it may not be, the second time.
    save_weights(tiny.run.dir, {name: torch.zeros_like(tensor) for name, tensor in first.items()}, epoch=2)
    capsys.readouterr()
    killed_after(10, lambda: fit(tiny, "x"))
    message = "holds the weights of epoch 2, but the best epoch of the state to resume from is 1: going back to the"
    assert f"{tiny.run.dir}/best.safetensors {message} weights of epoch 1" in capsys.readouterr().out
    assert same(weights_of(tiny), first)
    (tiny.run.dir / "best.safetensors").unlink()
    fit(tiny, "x")
    assert "best.safetensors holds no weights of a known epoch" in capsys.readouterr().out
    assert same_weights(tiny, undisturbed)
    save_weights(tiny.run.dir, first, epoch=best + 7)
    with pytest.raises(RunError, match=rf"holds the weights of epoch {best + 7}, expected those of epoch {best}, the"):
        evaluate(tiny)
    (tiny.run.dir / "best.safetensors").write_bytes(b"cut off")
    with pytest.raises(RunError, match=r"best\.safetensors is damaged \(.*\); delete the folder and train again"):
        evaluate(tiny)


def test_a_run_folder_of_an_earlier_version_is_resumed_and_evaluated(tiny: Config) -> None:
    undisturbed = with_run(tiny, "undisturbed")
    metrics = fit(undisturbed, "x")
    killed_after(9, lambda: fit(tiny, "x"))
    state = torch.load(tiny.run.dir / "last.pt", weights_only=True)
    for run in state["members"]:
        del run["weights"], run["failed"]
    torch.save(state, tiny.run.dir / "last.pt")
    save_file(weights_of(tiny), tiny.run.dir / "best.safetensors")
    fit(tiny, "x")
    assert losses(tiny.run.dir) == losses(undisturbed.run.dir)
    assert same_weights(tiny, undisturbed)
    save_file(weights_of(tiny), tiny.run.dir / "best.safetensors")
    assert evaluate(tiny) == metrics


def test_gpu_out_of_memory_prints_one_line_with_advice(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 4.25 MiB is "
        "free. Including non-PyTorch memory, this process has 79.00 GiB memory in use.\nSee documentation"
    )

    def too_big(self: RunGroup, batch: Batch, last: bool) -> None:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(RunGroup, "learn", too_big)
    advice = (
        "--train.residency ram (features in the machine's memory) or a smaller --head.width; a changed setting needs"
    )
    for batch, tried in (("32", "--train.batch 16 --train.accumulate 2, "), ("1", "")):
        folder = tmp_path / f"batch{batch}"
        assert main(["fit", "--config", config_file, "--run.dir", str(folder), "--train.batch", batch]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("train fit: failed: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        assert f"4.25 MiB is free, with train.batch {batch}; try {tried}{advice}" in error
    assert main(["sweep", "--config", config_file, "--ratios", "0.5"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train sweep: failed: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert error.endswith("a changed setting needs another --name\n")

    def full(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ...")

    monkeypatch.undo()
    assert main(["fit", "--config", config_file, "--train.epochs", "1"]) == 0
    monkeypatch.setattr("egopatch.train.fitting.experiment.Features", full)
    for command in (["sweep", "--ratios", "0.5", "--name", "another"], ["explain", "--train.epochs", "1"]):
        assert main([*command, "--config", config_file]) == 1
        assert f"train {command[0]}: failed: CUDA error: out of memory, with train.batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", ["last.pt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("log.jsonl", "best.safetensors"))]
)
def test_a_full_disk_prints_one_line_and_keeps_the_last_state(
    tiny: Config, config_file: str, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    undisturbed = with_run(tiny, "undisturbed")
    fit(undisturbed, "x")
    killed_after(9, lambda: fit(tiny, "x"))
    files = {item.name for item in tiny.run.dir.iterdir()}
    with limited(resource.RLIMIT_FSIZE, (tiny.run.dir / file).stat().st_size - 1):
        assert main(["fit", "--config", config_file]) == 1
    assert capsys.readouterr().err == (
        f"train fit: failed: no space left while writing to {tiny.run.dir} (File too large); the last saved state is "
        "intact: free some space and run the same command again\n"
    )
    assert {item.name for item in tiny.run.dir.iterdir()} == files
    fit(tiny, "x")
    assert losses(tiny.run.dir) == losses(undisturbed.run.dir)
    assert same_weights(tiny, undisturbed)


def test_a_custom_data_set_without_questions_is_refused_by_name(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = load_dataset(tiny.data).clips
    bare = Dataset(clips, {"train": (), "val": (), "test": ()}, UNKNOWN_ANSWERS, (), "direct")
    monkeypatch.setitem(DATASETS._registered, "mine", lambda _: bare)
    with pytest.raises(
        ConfigError, match=r"^the data set mine has clips but no questions; expected questions of each part$"
    ):
        fit(replace(tiny, data=replace(tiny.data, name="mine")), "x")


def test_a_vocabulary_without_any_training_answer_is_refused(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(tiny.data)
    monkeypatch.setattr(experiment, "load_dataset", lambda data: replace(dataset, answers=("<UNK0>", "<UNK1>", "pink")))
    with pytest.raises(
        RunError, match=r"data has 256 train questions, but none has an answer that is published and in the answer voc"
    ):
        fit(tiny, "x")


def test_a_data_set_without_val_questions_is_refused_before_its_features_are_read(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(tiny.data)
    without = replace(dataset, questions={**dataset.questions, "val": ()})
    monkeypatch.setattr(experiment, "load_dataset", lambda data: without)
    monkeypatch.setattr(experiment, "Features", None)
    with pytest.raises(RunError, match=r" train, 0 val, [0-9]+ test questions; expected some of each"):
        fit(with_run(tiny, "unread"), "x")
