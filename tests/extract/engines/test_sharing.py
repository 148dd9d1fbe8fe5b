"""`auto` workers and decoders follow the configured device and the GPUs and cores that this process may use;
a worker's error reaches the job."""

import dataclasses
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from joblib.externals.loky.process_executor import ProcessPoolExecutor

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config, ConfigError, EncoderConfig
from egopatch.extract.encoders import Network, find_network
from egopatch.extract.engines import dispatch, joblib_engine, sharing
from egopatch.extract.engines.joblib_engine import call_in_workers
from egopatch.extract.engines.sharing import SharedJob, WorkersDied, worker_count
from egopatch.extract.feed import pool
from egopatch.extract.feed.pool import decoder_count
from egopatch.extract.worker.job_stats import JobStats, Stages
from egopatch.features import Store, StoreError, create_store, open_store
from egopatch.features.common.child_errors import ChildError
from egopatch.features.common.signals import Requeue, requeue_on_signals
from egopatch.features.state.catalog import Catalog
from tests.extract.job import wait_until
from tests.features.conftest import FINGERPRINT, IDS, SPEC, fill
from tests.features.faults import Picky

DEMO = Path("configs/demo/egovlpv2.yaml")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("device", "workers"), [("auto", 4), ("cuda", 4), ("cuda:3", 1), ("cpu", 1)])
def test_auto_starts_one_worker_per_selected_gpu(device: str, workers: int) -> None:
    assert worker_count(Config(encoder=EncoderConfig(device=device))) == workers
    assert worker_count(load_config(DEMO, ["--encoder.device", device, "--engine.workers", "3"])) == 3


def test_auto_starts_at_least_one_worker() -> None:
    assert worker_count(Config()) == max(torch.cuda.device_count(), 1)


@pytest.mark.parametrize(
    ("cores", "workers", "decoders"), [(1, 1, 1), (6, 1, 6), (6, 2, 3), (6, 4, 1), (64, 2, 32), (2, 4, 1)]
)
def test_auto_gives_each_worker_its_share_of_cores_as_decoders(
    cores: int, workers: int, decoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "usable_cores", lambda: cores)
    assert decoder_count(Config(), workers) == decoders


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "used"), [("auto", ["cuda:0", "cuda:1"]), ("cuda:3", ["cuda:3"] * 2), ("cpu", ["cpu"] * 2)]
)
def test_worker_processes_use_the_configured_device(
    device: str, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run_worker(shared: SharedJob, rank: int, workers: int, device: str, **_: int) -> None:
        seen.append(device)

    monkeypatch.setattr(joblib_engine, "run_worker", run_worker)
    for rank in range(2):
        joblib_engine._run_worker(SharedJob(Config(encoder=EncoderConfig(device=device)), b"", [], {}), rank, 2)
    assert seen == used


@pytest.mark.slow
def test_children_of_a_worker_can_be_stopped() -> None:
    """A worker ignores signals before and after its work, but a child must not inherit that."""
    (code,) = call_in_workers(_end_a_child, [()])
    assert code == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
def test_signalled_workers_finish_the_work_they_started(to_all: bool, tmp_path: Path) -> None:
    """Whether a scheduler signals all processes or only the job's first; a worker that has finished does not matter."""

    def stop() -> None:
        wait_until(lambda: {file.name for file in tmp_path.iterdir()} == {"ended 0", "begun 1"})
        children = psutil.Process().children() if to_all else []
        for process in [*children, psutil.Process()]:
            if "tracker" not in " ".join(process.cmdline()):
                process.send_signal(signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Requeue, match="SIGTERM"), requeue_on_signals():
        call_in_workers(_commit_slowly, [(tmp_path, rank) for rank in range(2)])
    stopper.join()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["begun 1", "ended 0", "ended 1"]


def test_signal_during_startup_stops_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signalled(ProcessPoolExecutor):
        def submit(self, *args: Any) -> Any:
            future = super().submit(*args)
            signal.raise_signal(signal.SIGTERM)
            return future

    monkeypatch.setattr(joblib_engine, "ProcessPoolExecutor", Signalled)
    before = set(psutil.Process().children())
    with pytest.raises(Requeue), requeue_on_signals():
        call_in_workers(time.sleep, [(20,), (20,)])
    started = [child for child in psutil.Process().children() if child not in before]
    _, left = psutil.wait_procs([child for child in started if "tracker" not in " ".join(child.cmdline())], 5)
    assert not left


def test_clips_committed_by_dead_workers_are_counted_as_untimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)
    stages = Stages(total_s=3.0)
    shards: list[list[int]] = []

    def run_workers(shared: SharedJob) -> JobStats:
        shards.append([work.shard for work in shared.works])
        if len(shards) == 1:
            fill(store, skip=IDS[4:])
            raise WorkersDied
        fill(store)
        return JobStats(committed=6, stages=stages)

    monkeypatch.setattr(joblib_engine, "run_workers", run_workers)
    job: Any = types.SimpleNamespace(
        config=load_config(DEMO, ["--engine.workers", "2"]), network=find_network("lite"), encoder=torch.nn.Identity()
    )
    stats = dispatch.encode_with_engine(job, store, store.missing_shards(), {}, lambda clips, _: None)
    assert shards == [[0, 1, 2], [1, 2]]
    assert stats == JobStats(committed=10, stages=stages, untimed=4)


def test_progress_survives_an_unreachable_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(tmp_path, SPEC, FINGERPRINT, IDS)
    reports: list[int] = []

    def refresh(_: object) -> None:
        raise StoreError("cannot be reached")

    with dispatch._LedgerProgress(store, lambda clips, _: reports.append(clips)):
        monkeypatch.setattr(Catalog, "refresh", refresh)
    assert reports[-1:] == [0]


def test_progress_is_counted_without_going_through_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may have millions, and the ledger is looked at every two seconds."""
    store = create_store(tmp_path, SPEC, FINGERPRINT, IDS)
    fill(store, skip=IDS[4:])
    reports: list[int] = []
    monkeypatch.delattr(Store, "clip_ids")
    with dispatch._LedgerProgress(store, lambda clips, _: reports.append(clips)):
        fill(open_store(tmp_path))
    assert sum(reports) == len(IDS) - 4


def test_signal_during_device_selection_stops_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding GPUs takes seconds; a worker that missed the signal would be killed in the midst of its work. It refuses
    the call that was meant for another worker, which has not begun."""

    def device_of_worker(*_: object) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "cpu"

    monkeypatch.setattr(joblib_engine, "device_of_worker", device_of_worker)
    monkeypatch.setattr(joblib_engine, "run_worker", lambda *_, **__: pytest.fail("the worker missed the signal"))
    call = (SharedJob(Config(), b"", [], {}), 0, 1)
    with pytest.raises(Requeue, match="SIGTERM"):
        joblib_engine._in_worker(joblib_engine._run_worker, call)
    with pytest.raises(Requeue):
        joblib_engine._in_worker(lambda: pytest.fail("the worker forgot the signal"), ())


def _end_a_child() -> int:
    """The exit code of a child of a worker."""
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    try:
        return child.wait(5)
    finally:
        child.kill()


def _commit_slowly(folder: Path, rank: int) -> None:
    """As worker 1, begin something that takes until after a signal; as worker 0, have nothing to do."""
    try:
        if rank:
            (folder / f"begun {rank}").touch()
            time.sleep(60)
    finally:
        time.sleep(rank)
        (folder / f"ended {rank}").touch()


def network_with(build_video: Any) -> Network:
    return dataclasses.replace(find_network("lite"), name="mine", build_video=build_video)


def test_network_defined_in_a_script_reaches_workers() -> None:
    script = types.ModuleType("__main__")
    exec("TIMES = 2\ndef build_video(checkpoint, options): return TIMES * options", script.__dict__)
    packed = sharing.pack_network(network_with(script.build_video))
    unpacked: Any = sharing._unpack_network(packed, "mine")
    assert unpacked.build_video(None, 3) == 6


def test_network_that_cannot_be_pickled_is_refused_in_one_line() -> None:
    lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"'mine', which cannot be sent to worker processes \(cannot pickle.*lock"):
        sharing.pack_network(network_with(lambda checkpoint, options: lock))


def test_network_that_a_worker_cannot_import_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("only_here")
    exec("def build_video(checkpoint, options): ...", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    packed = sharing.pack_network(network_with(module.build_video))
    monkeypatch.delitem(sys.modules, "only_here")
    config = Config(encoder=EncoderConfig(arch="mine"))
    with pytest.raises(ConfigError, match=r"'mine', which a worker on .* cannot load \(.*No module named 'only_here'"):
        sharing.run_worker(SharedJob(config, packed, [], {}), 0, 1, "cpu", 1)


@pytest.mark.parametrize(
    ("error", "sent"), [(Picky(3, "no driver"), ChildError), (FileNotFoundError(2, "no driver"), FileNotFoundError)]
)
def test_an_error_of_a_worker_reaches_the_job(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sent: type[Exception]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(sharing, "start_trackers", fail)
    with pytest.raises(sent, match="no driver") as caught:
        sharing.run_worker(SharedJob(Config(), b"", [], {}), 0, 1, "cpu", 1)
    assert (caught.value is error) == (sent is not ChildError)
    # An engine sends the traceback as text: it leads to the place where the error was raised.
    assert "in fail" in "".join(traceback.format_exception(caught.value))
