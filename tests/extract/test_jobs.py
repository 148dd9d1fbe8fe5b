"""Jobs that share a store, are interrupted, killed and resumed: the store always equals that of one undisturbed job."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from egopatch.extract import run
from egopatch.extract.__main__ import main
from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.commands.run import HELD
from egopatch.extract.datasets import load_dataset
from egopatch.extract.engines.job_slice import Slice
from egopatch.extract.run import extract_features
from egopatch.extract.worker.batch_encoder import BatchEncoder
from egopatch.extract.worker.job import resolve_job
from egopatch.extract.worker.job_stats import jobs_path
from egopatch.features import ShardWork, open_store
from egopatch.features.common.signals import REQUEUE, Requeue, requeue_on_signals, signals_held
from egopatch.features.io import file_lease
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from egopatch.interrupt import ignore_repeated
from tests.extract.job import (
    CLIPS,
    committed,
    config_of,
    contents,
    ledger_lines,
    options,
    signal_all,
    slowly,
    start_job,
    videos,
    wait_until,
)
from tests.features.faults import limited


@pytest.mark.slow
def test_slices_in_any_order_write_the_same_store_as_one_job(made: Path, bare: Path) -> None:
    for index, clips in ((2, 5), (0, 15), (1, 20)):
        assert main(["run", *options(bare), "--shard", f"{index}/3"]) == 0
        assert committed(bare / "store") == clips
    assert contents(bare / "store") == contents(made / "store")
    assert ledger_lines(bare / "store") == ledger_lines(made / "store")


def test_slice_selects_the_same_shards_whatever_remains() -> None:
    works = [ShardWork(number, ("x",)) for number in (1, 2, 3, 5, 6)]
    assert [work.shard for work in Slice.parse("0/3").of(works)] == [3, 6]
    assert [work.shard for work in Slice.parse("2/3").of(works)] == [2, 5]


@pytest.mark.parametrize("text", ["3/3", "-1/2", "a/b", "1", "1/0", "1/2/3", "0x1/2"])
def test_malformed_slice_exits_with_code_2_and_one_line(
    text: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *options(made), f"--shard={text}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--shard is {text!r}; expected i/N with 0 <= i < N" in line


@pytest.mark.slow
def test_four_concurrent_jobs_succeed_and_share_the_work(single: Path, bare: Path) -> None:
    jobs = [start_job(slowly(bare, "--wait")) for _ in range(4)]
    outputs = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, outputs
    assert contents(bare / "store") == contents(single)
    assert ledger_lines(bare / "store") == ledger_lines(single)  # no shard was written twice
    committed_by = [json.loads(line)["committed"] for line in jobs_path(bare / "store").read_text().splitlines()]
    assert sum(committed_by) == CLIPS
    texts = len(load_dataset(config_of(bare).data).texts)
    for out, error in outputs:
        assert error == ""
        assert f"{CLIPS}/{CLIPS} clips and {texts} questions stored" in out


@pytest.fixture
def begun(bare: Path) -> Path:
    """A store in which one of four shards is done."""
    assert main(["run", *options(bare), "--shard", "1/4"]) == 0
    return bare


@pytest.mark.slow
def test_shards_held_by_other_jobs_give_a_distinct_exit_code(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = begun / "store"
    texts = len(load_dataset(config_of(begun).data).texts)
    stored = len(open_store(store / "text").clip_ids)
    assert stored < texts
    with file_lease.hold(store, 2), file_lease.hold(store / "text", 0):
        capsys.readouterr()
        assert main(["run", *options(begun)]) == HELD == 3
    out, error = capsys.readouterr()
    assert f"{CLIPS - 5}/{CLIPS} clips and {stored} questions stored; this run encoded 10 clips" in out
    (line,) = error.splitlines()
    assert line.startswith(
        f"extract run: 5 clips and {texts - stored} questions are left, in shards that other processes"
    )
    assert main(["run", *options(begun)]) == 0
    assert f"{CLIPS}/{CLIPS} clips and {texts} questions stored" in capsys.readouterr().out


@pytest.mark.slow
def test_missing_semaphores_are_reported_in_one_line_if_they_are_needed(bare: Path) -> None:
    refuse = (
        "import sys\n"
        "from multiprocessing import synchronize\n"
        "def refuse(*args, **kwargs): raise OSError(30, 'Read-only file system')\n"
        "synchronize.SemLock.__init__ = refuse\n"
        "from egopatch.extract.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", refuse, "run", *options(bare)]
    job = subprocess.run([*command, "--engine.workers", "2"], capture_output=True, text=True, check=False)
    assert job.returncode == 1
    assert job.stderr.startswith("extract run: failed: /dev/shm: Read-only file system; encoding in worker processes")
    assert job.stderr.count("\n") == 1
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, "one worker needs none"


@pytest.mark.slow
def test_retry_reports_and_waits_for_the_shards_of_other_jobs(
    made: Path, bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bad,) = videos(bare)[:1]
    bad.write_bytes(b"no video")
    assert main(["run", *options(bare)]) == 0
    assert main(["retry", *options(bare)]) == 0  # it fails again, and no other job holds it
    shutil.copy(made / bad.relative_to(bare), bad)
    with ExitStack() as held:
        held.enter_context(file_lease.hold(bare / "store", 0))
        capsys.readouterr()
        assert main(["retry", *options(bare)]) == HELD
        assert capsys.readouterr().err.startswith(
            "extract retry: 1 clip and 0 questions are left, in shards that other"
        )
        monkeypatch.setattr(run, "time", SimpleNamespace(sleep=lambda _: held.close(), monotonic=lambda: 0.0))
        assert main(["retry", *options(bare), "--wait"]) == 0
    assert "waiting for 1 clip in shards that other processes hold" in capsys.readouterr().out
    assert not open_store(bare / "store").quarantine


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_waiting_job_encodes_shards_that_others_release(
    workers: str, made: Path, begun: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun / "store"
    with ExitStack() as clips, ExitStack() as texts:
        clips.enter_context(file_lease.hold(store, 2))
        texts.enter_context(file_lease.hold(store / "text", 0))
        releases = iter([texts.close, clips.close])
        monkeypatch.setattr(run, "time", SimpleNamespace(sleep=lambda _: next(releases)(), monotonic=lambda: 0.0))
        assert main(["run", *options(begun, "--engine.workers", workers), "--wait"]) == 0
    waits = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting for")]
    assert [line.split()[3] for line in waits] == ["questions", "clips"]
    assert waits[1].startswith(
        f"waiting for 5 clips in shards that other processes hold; shard 2 of {store} is held by process {os.getpid()} "
    )
    assert contents(store) == contents(made / "store")


@pytest.mark.slow
def test_a_complete_store_may_be_read_only(made: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount anything")
    mount = f"mount --bind {made} {made} && mount -o remount,bind,ro {made} && ! touch {made}/x 2>&- && exec "
    job = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + shlex.join([sys.executable, "-m", "extract", "run", *options(made)])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    assert f"{CLIPS}/{CLIPS} clips" in job.stdout


@pytest.mark.slow
def test_full_disk_is_reported_in_one_line_and_the_job_resumes(
    made: Path, bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands for the disk, and fails in the same calls."""
    patches = max(path.stat().st_size for path in (made / "store" / "patches").glob("c*"))
    unlimited, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    make = SharedSlots.__init__

    def make_without_limit(self: SharedSlots, *args: Any) -> None:
        """Shared memory for frames, which counts towards this limit although it is not on disk."""
        with limited(resource.RLIMIT_FSIZE, unlimited):
            make(self, *args)

    monkeypatch.setattr(SharedSlots, "__init__", make_without_limit)

    def run_with(limit: int) -> str:
        with limited(resource.RLIMIT_FSIZE, limit):
            assert main(["run", *options(bare)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert run_with(100).startswith(f"extract run: failed: no space left while creating {bare / 'store'} ")
    assert main(["run", *options(bare), "--shard", "0/4"]) == 0  # the texts and a quarter of the clips
    line = run_with(patches - 1)
    assert re.match(rf"extract run: failed: no space left while writing shard [123] of {bare / 'store'} ", line)
    assert "free some space and run the same command again" in line
    assert verify(bare / "store").ok
    assert main(["run", *options(bare)]) == 0
    assert contents(bare / "store") == contents(made / "store")


@pytest.mark.slow
def test_another_job_finishes_the_work_of_a_killed_one(single: Path, bare: Path) -> None:
    killed = start_job(slowly(bare))
    wait_until(lambda: committed(bare / "store") >= 3)
    other = start_job(slowly(bare))
    killed.kill()
    killed.communicate()
    out, error = other.communicate(timeout=180)
    assert other.returncode == 0, error
    assert f"{CLIPS}/{CLIPS} clips" in out
    assert contents(bare / "store") == contents(single)
    assert verify(bare / "store").ok


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_prints_one_line_and_leaves_no_processes(workers: str, single: Path, bare: Path) -> None:
    job = start_job(slowly(bare, "--engine.workers", workers))
    wait_until(lambda: committed(bare / "store") >= 2)
    family = psutil.Process(job.pid).children(recursive=True)
    signal_all(job, signal.SIGINT)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 130
    assert error == "extract run: interrupted; run the same command again to resume\n"
    assert len(family) >= int(workers)
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert 2 <= committed(bare / "store") < CLIPS
    assert main(["run", *slowly(bare)]) == 0
    assert contents(bare / "store") == contents(single)


@pytest.mark.usefixtures("closing_terminal")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "2"), (signal.SIGUSR1, "1"), (signal.SIGHUP, "2")])
def test_job_stopped_by_a_scheduler_signal_requests_a_requeue(
    number: signal.Signals, workers: str, single: Path, bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = start_job(slowly(bare, "--engine.workers", workers))
    wait_until(lambda: committed(bare / "store") >= 2)
    signal_all(job, signal.SIGSTOP)  # on a busy machine it might end before `status` does
    assert main(["status", *slowly(bare), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["planned"] == CLIPS
    assert status["committed"] >= 2
    assert status["committed"] + status["missing"] == CLIPS
    family = psutil.Process(job.pid).children(recursive=True)
    signal_all(job, signal.SIGCONT)
    signal_all(job, number)
    _, error = job.communicate(timeout=60)
    assert job.returncode == REQUEUE == 75
    assert error == f"extract run: interrupted by {number.name}; run the same command again to resume\n"
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not list((bare / "store" / "leases").glob("*.json"))
    assert verify(bare / "store").ok
    assert main(["run", *slowly(bare)]) == 0
    assert contents(bare / "store") == contents(single)


@pytest.mark.usefixtures("closing_terminal")
@pytest.mark.parametrize("command", ["run", "retry", "videos"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signal_during_imports_requests_a_requeue(
    command: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a shared file system that may take half a minute."""
    monkeypatch.setattr("egopatch.extract.__main__.load_command", lambda _: signal.raise_signal(number))
    assert main([command, "--config", "a.yaml"]) == REQUEUE
    line = f"extract {command}: interrupted by {number.name}; run the same command again to resume\n"
    assert capsys.readouterr().err == line
    assert signal.getsignal(number) is ignore_repeated


def test_signals_after_the_first_are_ignored_to_the_end() -> None:
    with pytest.raises(Requeue, match="SIGUSR1"), requeue_on_signals():
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)  # what a scheduler sends when the time is up


def test_a_signal_that_a_library_dropped_stops_the_job(bare: Path) -> None:
    with requeue_on_signals():
        with suppress(Requeue):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Requeue):
            extract_features(resolve_job(config_of(bare)))
    assert committed(bare / "store") == 0


def test_without_a_signal_the_former_handler_is_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with requeue_on_signals():
        assert signal.getsignal(signal.SIGUSR1) is not before
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_job_under_nohup_survives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with requeue_on_signals(), signals_held():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(single: Path, bare: Path) -> None:
    job = start_job(slowly(bare, "--engine.workers", "2"))
    wait_until(lambda: committed(bare / "store") >= 2)
    workers = [p for p in psutil.Process(job.pid).children() if "loky" in " ".join(p.cmdline())]
    holders = {json.loads(path.read_text())["pid"] for path in (bare / "store" / "leases").glob("*.json")}
    victim = next(p.pid for p in workers if p.pid in holders)
    os.kill(victim, signal.SIGKILL)
    out, error = job.communicate(timeout=180)
    assert job.returncode == 0, error
    assert "Traceback" not in error
    assert f"{CLIPS}/{CLIPS} clips" in out
    assert f"this run encoded {CLIPS} clips" in out
    assert contents(bare / "store") == contents(single)


def test_repair_and_run_reencode_only_damaged_clips(
    made: Path, fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fresh / "store"
    damaged = max((store / "patches").glob("c*"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 16
    damaged.write_bytes(content)
    bad = verify(store).bad_clips
    assert len(bad) == 1
    assert main(["run", *options(fresh)]) == 0  # a run trusts the ledger; only verify looks
    assert "this run encoded 0 clips" in capsys.readouterr().out
    repair(store)

    encoded: list[str] = []
    add = BatchEncoder.add
    monkeypatch.setattr(BatchEncoder, "add", lambda self, clip: encoded.append(clip.clip.clip_id) or add(self, clip))
    assert main(["run", *options(fresh)]) == 0
    assert encoded == list(bad)
    assert contents(store) == contents(made / "store")
    assert verify(store).ok


@pytest.mark.parametrize(("limit", "kept"), [("4", 5), ("0.25", 15)])
@pytest.mark.slow
def test_errors_over_the_limit_stop_the_job_and_keep_the_rest(
    limit: str, kept: int, made: Path, bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = videos(bare)[5:10]
    for path in bad:
        path.write_bytes(b"no video")
    assert main(["run", *options(bare, "--engine.max_errors", limit)]) == (1 if kept == 5 else 0)
    error = capsys.readouterr().err
    assert error.count("\n") == (1 if kept == 5 else 0)
    assert f"engine.max_errors allows {limit}" in error or kept == 15
    assert committed(bare / "store") == kept
    assert verify(bare / "store").ok
    assert not list((bare / "store" / "leases").glob("*.json"))
    for path in bad:
        shutil.copy(made / path.relative_to(bare), path)
    assert main(["retry", *options(bare)]) == 0
    # Attempts are remembered; the rows are those of a job that met no bad video.
    after, expected = contents(bare / "store"), contents(made / "store")
    assert after.pop("quarantine.jsonl") != expected.pop("quarantine.jsonl")
    assert after == expected
    assert not open_store(bare / "store").quarantine


def test_insufficient_disk_space_is_refused_before_encoding(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egopatch.extract.planning.plan._bytes_free", lambda path: 1000)
    assert main(["plan", *options(bare), "--probe", "0"]) == 1
    plan = capsys.readouterr().out
    assert f"refused    store.path is {bare / 'store'}: {CLIPS} clips need" in plan
    assert main(["run", *options(bare)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"extract run: failed: store.path is {bare / 'store'}: {CLIPS} clips need")
    assert line.endswith("make room or choose another disk")
    assert committed(bare / "store") == 0
