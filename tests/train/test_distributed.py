"""Several processes training one head match a single process, and all of them stop when one does."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from egopatch.configs.schema import Config, ConfigError
from egopatch.train.__main__ import main
from egopatch.train.data.batch import Batch, RankSlice
from egopatch.train.data.question_table import plan_batches
from egopatch.train.fitting.build_heads import build_stacked_heads
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import fit
from egopatch.train.processes.distributed import ALONE, Distributed, RankLost, join
from egopatch.train.steps.stacked_heads import StackedHeads
from tests.train.test_published import make
from tests.train.tiny import events, losses, with_run, write_tiny, written

ROOT = Path(__file__).parents[2]
# Sums over ranks are taken in another order; training carries the rounding on.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


def start(command: Sequence[str], ranks: int = 2) -> subprocess.Popen[str]:
    """Start `command`, a module or Python file with its arguments, on `ranks` ranks that talk over loopback."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launcher, *command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Settings that split the work among ranks in different ways."""
    root = tmp_path_factory.mktemp("ranks")
    base = write_tiny(root, bad=("clip|P46|0|47", "clip|P0|0|1"))
    uneven = {"train_accumulate": 3, "train_ema": 0.8, "train_label_smoothing": 0.1, "train_batch": 17}
    networks = make(root / "networks", "mfas")
    return {
        "psa": with_run(base, "psa", train_residency="ram"),
        # 8 questions a clip: a batch has two clips, or the last one, so that a rank often has nothing.
        "uneven": with_run(base, "uneven", head_scores=("question", "random"), **uneven),
        "egovlp": with_run(base, "egovlp", head_name="egovlp", train_residency="disk"),
        "question-only": with_run(base, "question-only", head_name="question-only"),
        "majority": with_run(base, "majority", head_name="majority"),
        "contrast": with_run(base, "contrast", data_paraphrases=True, train_contrast=0.5, train_residency="disk"),
        "mfas": with_run(networks, "mfas", train_residency="ram"),
    }


@pytest.fixture(scope="module")
def together(alone: dict[str, Config]) -> tuple[dict[str, Config], str]:
    """The same on two ranks, and what they print."""
    configs = {name: with_run(config, f"{name}-together") for name, config in alone.items()}
    process = start(["-m", "tests.train.rank_job", *map(written, configs.values())])
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return configs, out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["psa", "uneven", "egovlp", "question-only", "majority", "contrast", "mfas"])
def test_two_ranks_match_one_process_step_by_step(
    alone: dict[str, Config], together: tuple[dict[str, Config], str], name: str
) -> None:
    one, two = alone[name], together[0][name]
    fit(one, "x")
    assert len(losses(one.run.dir)) == (0 if name == "majority" else len(events(two.run.dir, "step")))
    for key in ("loss", "grad_norm", "lr"):
        traces = [[event[key] for event in events(config.run.dir, "step")] for config in (one, two)]
        np.testing.assert_allclose(traces[1], traces[0], **TOLERANCE)
    assert events(one.run.dir, "val") == events(two.run.dir, "val")
    for file in ("predictions.jsonl", "test.json"):
        assert (one.run.dir / file).read_text() == (two.run.dir / file).read_text()
    here, there = (load_file(config.run.dir / "best.safetensors") for config in (one, two))
    for key in here:  # as a whole: Adam moves a weight whose gradient is all rounding by as much as any other
        assert torch.linalg.vector_norm(there[key] - here[key]) <= 1e-3 * torch.linalg.vector_norm(here[key]), key
    if name in ("psa", "uneven"):
        with np.load(one.run.dir / "selection.npz") as here, np.load(two.run.dir / "selection.npz") as there:
            assert np.array_equal(here["kept"], there["kept"])
    assert {path.name for path in one.run.dir.iterdir()} == {path.name for path in two.run.dir.iterdir()}


@pytest.mark.parametrize("name", ["psa", "uneven", "egovlp", "question-only", "contrast", "mfas"])
def test_gradients_of_rank_slices_sum_to_those_of_the_batch(alone: dict[str, Config], name: str) -> None:
    experiment = open_experiment(alone[name])
    features, table = experiment.features, experiment.train_table
    for rows in plan_batches(table, 17, seed=0)[:3]:
        stack = build_stacked_heads([alone[name]], experiment)

        def learned(batch: Batch, stack: StackedHeads = stack) -> tuple[Tensor, dict[str, Tensor]]:
            stack._head.train()
            stack._set_noise(batch, 5)
            losses = stack._backward(batch)
            gradients = {key: gradient.clone() for key, gradient in stack.state()["gradients"].items()}
            stack.optimiser.zero_grad()
            return losses, gradients

        owner = torch.arange(len(table.clips)) % 2
        whole = learned(features.batch(table, rows))
        parts = [learned(features.batch(table, rows, owner == rank)) for rank in range(2)]
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        for key, gradient in whole[1].items():
            of_parts = [part[1][key] for part in parts if key in part[1]]
            torch.testing.assert_close(sum(of_parts), gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
def test_each_clip_is_held_by_one_rank_and_the_output_says_so(together: tuple[dict[str, Config], str]) -> None:
    out = together[1]
    assert out.count("each of 2 ranks reads and keeps only its own clips, ") == 5  # two heads read no video
    assert "kept in memory (set by train.residency; " in out
    held = ast.literal_eval(out[out.index("held ") + len("held ") :])
    (first, of_first), (second, of_second) = held
    assert len(first) == len(second) == 6
    assert not set(first) & set(second)
    assert of_first == of_second


def test_summing_over_ranks_does_not_read_values_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on `meta` have no values, so that reading one fails, as it waits on a GPU."""
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", sent.append)
    like = [torch.empty(2, 3, device="meta"), torch.empty(4, device="meta"), torch.empty((), device="meta")]
    sums = Distributed(rank=0, size=2).sum_tensors([like[0], None, like[2]], like)
    assert [None if total is None else tuple(total.shape) for total in sums] == [(2, 3), None, ()]
    assert [(tensor.device.type, tensor.numel()) for tensor in sent] == [("cpu", 3), ("meta", 11)]


def test_sums_over_ranks_have_the_dtypes_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head from outside may have parameters of several dtypes; a gradient must have its parameter's."""
    monkeypatch.setattr(dist, "all_reduce", lambda _: None)
    like = [torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    sums = Distributed(rank=0, size=2).sum_tensors(like, like)
    assert all(total is not None and total.dtype == other.dtype for total, other in zip(sums, like, strict=True))


def test_a_rank_slice_knows_its_place_in_the_whole_batch() -> None:
    clips, texts = torch.tensor([4, 4, 1, 7]), torch.tensor([0, 5, 5, 2])
    share = RankSlice.of(clips, texts, torch.tensor([True, True, False, False]))
    assert [part.tolist() for part in (share.questions, share.clips, share.texts)] == [[0, 1], [1], [0, 2]]
    assert share.total == 4
    nothing = RankSlice.of(clips, texts, torch.zeros(4, dtype=torch.bool))
    assert [part.tolist() for part in (nothing.questions, nothing.clips, nothing.texts)] == [[], [], []]


def test_without_torchrun_there_is_one_rank() -> None:
    with join(cuda=False) as ranks:
        assert ranks is ALONE
    assert Distributed().broadcast(lambda: 3) == 3
    assert Distributed().gather("x") == ["x"]


def test_world_size_without_the_torchrun_variables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    expected = (
        "WORLD_SIZE is 2, but LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT is not set; start with torchrun, or unset "
        "WORLD_SIZE"
    )
    with pytest.raises(ConfigError, match=expected), join(cuda=False):
        pass


@pytest.mark.parametrize(
    ("variable", "value", "fault"),
    [
        (
            "WORLD_SIZE",
            "two",
            "WORLD_SIZE is 'two'; expected a whole number, as torchrun sets it: start with torchrun, or",
        ),
        ("WORLD_SIZE", "２", "WORLD_SIZE is '２'; expected a whole number"),
        ("RANK", " 1", "RANK is ' 1'; expected a whole number"),
        ("MASTER_PORT", "+1", r"MASTER_PORT is '\+1'; expected a whole number"),
        ("RANK", "2", "RANK is 2 of WORLD_SIZE 2, and LOCAL_RANK 0 of LOCAL_WORLD_SIZE 1; expected ranks below these"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_RANK 0 of LOCAL_WORLD_SIZE 0; expected ranks below these numbers"),
    ],
)
def test_invalid_rank_variables_are_refused(
    variable: str, value: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "1"}
    for name, text in (ranks | {variable: value}).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=fault), join(cuda=False):
        pass


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": 99, "RANK": 3, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 99, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(ConfigError, match=r"torchrun started 99 ranks on this machine, which has .* --nproc-per-node"),
        join(cuda=True),
    ):
        pass


def test_a_sweep_under_torchrun_is_refused(
    alone: dict[str, Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["sweep", "--config", written(alone["psa"]), "--seeds", "0", "1"]) == 2
    expected = "train sweep (rank 1): error: torchrun cannot start a sweep; start the command once"
    assert expected in capsys.readouterr().err


def test_a_lost_rank_is_named_although_torchrun_sends_sigterm_meanwhile(
    alone: dict[str, Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_a_rank(*_: object) -> None:
        try:
            raise RankLost("rank 0 of 2 lost contact with the others")
        finally:
            signal.raise_signal(signal.SIGTERM)  # while the run's files are closed

    monkeypatch.setattr("egopatch.train.fitting.fit.fit", lose_a_rank)
    assert main(["fit", "--config", written(alone["psa"])]) == 1
    assert "train fit: failed: rank 0 of 2 lost contact with the others" in capsys.readouterr().err


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.ZombieProcess:  # another test's
        return None


def interrupted(config: Config, steps: int, number: int, whom: str) -> str:
    """Train on two ranks, send the launcher or rank 1 a signal after so many steps; returns its standard error."""
    log = config.run.dir / "log.jsonl"
    with start(["-m", "train", "fit", "--config", written(config)]) as process:
        ranks: dict[str | None, psutil.Process] = {}
        while process.poll() is None and "1" not in ranks:  # sought before the steps, which pass quickly
            time.sleep(0.05)
            ranks = {rank_of(child): child for child in psutil.Process(process.pid).children()}
        while process.poll() is None and (not log.exists() or log.read_text().count('"step", "step"') < steps):
            time.sleep(0.01)  # leaves the cores to the processes under test
        (ranks["1"] if whom == "rank 1" else process).send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode != 0, out
    assert not (config.run.dir / "test.json").exists()
    return err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An uninterrupted run on two ranks, with partly accumulated steps at the end of its epochs."""
    base = write_tiny(tmp_path_factory.mktemp("undisturbed"))
    config = with_run(base, "undisturbed", train_epochs=14, train_accumulate=3, train_ema=0.8)
    out, err = (process := start(["-m", "train", "fit", "--config", written(config)])).communicate()
    assert process.returncode == 0, out + err
    return config


def goes_on(config: Config, ranks: int) -> None:
    process = start(["-m", "train", "fit", "--config", written(config)], ranks)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert "resuming after step" in out


@pytest.mark.slow
def test_a_killed_rank_stops_all_ranks_and_the_run_resumes(undisturbed: Config) -> None:
    config = with_run(undisturbed, "killed")
    err = interrupted(config, 7, signal.SIGKILL, "rank 1")
    assert "train fit (rank 0): failed: rank 0 of 2 lost contact with the others" in err
    assert "Run the same command again to resume from the last saved step" in err
    assert not any(rank_of(process) for process in psutil.Process().children(recursive=True))
    fewer = with_run(undisturbed, "elsewhere/killed")
    shutil.copytree(config.run.dir, fewer.run.dir)
    goes_on(config, ranks=2)
    assert losses(config.run.dir) == losses(undisturbed.run.dir)
    goes_on(fewer, ranks=1)
    np.testing.assert_allclose(losses(fewer.run.dir), losses(undisturbed.run.dir), **TOLERANCE)


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_at_the_same_step(undisturbed: Config) -> None:
    config = with_run(undisturbed, "stopped")
    err = interrupted(config, 7, signal.SIGINT, "launcher")
    assert err.count("train fit: interrupted in epoch ") == 1
    assert "lost contact with the others" not in err
    goes_on(config, ranks=2)
    assert losses(config.run.dir) == losses(undisturbed.run.dir)
