"""Shards that child processes commit: the same files, the same errors, and nothing lost when a child is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.errors import JobFailed
from egopatch.extract.writing.commit_processes import CommitProcesses
from egopatch.extract.writing.shard_writer import BackgroundShardWriter, EncodedShard
from egopatch.features import Fingerprint, Store, StoreSpec, create_store
from egopatch.features.state.commit import CommitTarget, ShardCommit, commit_shard
from egopatch.features.tools.verify import verify
from egopatch.features.values.errors import NotFinite
from tests.extract.job import wait_until

IDS = list("abcd")
SPEC = StoreSpec.for_patches(frames=2, grid=(16, 16), width=128, dtype="float16", shard=4)
PATCHES = 2 * 256 * 128
schedule = CommitProcesses.schedule


class Rows:
    """Rows of which the patches lie in slots, as an encoder leaves them."""

    def __init__(self, slots: SharedSlots | None) -> None:
        self.slots = slots

    def __call__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        patches = torch.randn(2, 256, 128, generator=generator).half()
        if self.slots:
            memory = torch.from_numpy(self.slots.memory(self.slots.take())).view(torch.float16)[:PATCHES]
            patches = memory.view(patches.shape).copy_(patches)
        small = {name: torch.randn(shape, generator=generator) for name, shape in self.small().items()}
        return {"patches": patches, **small}

    def small(self) -> dict[str, tuple[int, ...]]:
        return {array.name: array.shape for array in SPEC.arrays if array.name != "patches"}


@pytest.fixture(scope="module")
def slots() -> Iterator[SharedSlots]:
    slots = SharedSlots(60, 2 * PATCHES, "rows", "")
    yield slots
    slots.close()


@pytest.fixture(scope="module", params=["zarr", "hdf5"])
def processes(slots: SharedSlots, request: pytest.FixtureRequest) -> Iterator[tuple[str, CommitProcesses]]:
    with CommitProcesses(slots, 1, request.param) as processes:
        yield request.param, processes


def make(path: Path, file_format: str = "zarr") -> Store:
    return create_store(path, SPEC, Fingerprint({"x": 1}), IDS, format=file_format)


def write(store: Store, rows: dict[str, dict[str, Tensor]], committer: Callable[..., None]) -> None:
    store.write_shard(0, rows, dict.fromkeys(rows, "hash"), committer=committer)


def test_child_processes_write_the_same_files_as_this_process(
    tmp_path: Path, slots: SharedSlots, processes: tuple[str, CommitProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    file_format, committer = processes
    tasks: list[object] = []

    def counted(self: CommitProcesses, *task: Any) -> object:
        tasks.append(task)
        return schedule(self, *task)

    monkeypatch.setattr(CommitProcesses, "schedule", counted)
    here, there = make(tmp_path / "here", file_format), make(tmp_path / "there", file_format)
    write(here, {name: Rows(None)(i) for i, name in enumerate(IDS)}, commit_shard)
    assert not tasks
    write(there, {name: Rows(slots)(i) for i, name in enumerate(IDS)}, committer)
    assert len(tasks) == 1
    assert there.clip_ids == tuple(IDS)
    for array in SPEC.arrays:
        assert torch.equal(here.read_arrays(IDS)[array.name], there.read_arrays(IDS)[array.name])
    assert here.catalog.ledger.commits[0].files == there.catalog.ledger.commits[0].files
    assert verify(there.path).ok


def test_rows_outside_shared_memory_are_written_by_this_process(
    tmp_path: Path, slots: SharedSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CommitProcesses, "schedule", lambda *_: pytest.fail("a child got rows that it cannot see"))
    store = make(tmp_path / "store")
    with CommitProcesses(slots, 1, "zarr") as committer:
        write(store, {"a": Rows(slots)(0), "b": Rows(None)(1)}, committer)
    assert store.clip_ids == ("a", "b")


def test_non_finite_row_is_named_and_not_stored(
    tmp_path: Path, slots: SharedSlots, processes: tuple[str, CommitProcesses]
) -> None:
    file_format, committer = processes
    store = make(tmp_path / "store", file_format)
    rows = {name: Rows(slots)(i) for i, name in enumerate(IDS)}
    rows["c"]["patches"][1, 7, 5] = float("inf")
    with pytest.raises(NotFinite, match="clip 'c': patches holds NaN or infinity; it is not stored"):
        write(store, rows, committer)
    assert store.clip_ids == ()


def test_concurrent_commit_by_another_process_is_kept(
    tmp_path: Path, slots: SharedSlots, processes: tuple[str, CommitProcesses]
) -> None:
    file_format, committer = processes
    store = make(tmp_path / "store", file_format)
    calls = []

    def late(target: CommitTarget, commit: ShardCommit) -> None:
        calls.append(list(commit.rows))
        if len(calls) == 1:
            commit_shard(target, ShardCommit(**{**vars(commit), "rows": {"a": 0}, "sources": first(commit)}))
        committer(target, commit)

    def first(commit: ShardCommit) -> list[Any]:
        return [(array, sources[:1]) for array, sources in commit.sources]

    write(store, {name: Rows(slots)(i) for i, name in enumerate(IDS)}, late)
    assert calls == [IDS, IDS]
    assert store.clip_ids == tuple(IDS)
    assert verify(store.path).ok


def test_killed_child_fails_one_write_and_the_next_succeeds(
    tmp_path: Path, slots: SharedSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "store")
    rows = {name: Rows(slots)(i) for i, name in enumerate(IDS)}
    with CommitProcesses(slots, 1, "zarr") as committer:
        with monkeypatch.context() as patched:
            patched.setattr(CommitProcesses, "schedule", lambda self, *task: schedule(self, die, *task))
            with pytest.raises(
                JobFailed, match=r"the process that wrote shard 0 of .*store was killed \(exit code -?\d+\), perhaps"
            ):
                write(store, rows, committer)
        assert store.clip_ids == ()
        write(store, rows, committer)
    assert store.clip_ids == tuple(IDS)
    assert verify(store.path).ok


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_started_commit_finishes_despite_a_signal_to_all_processes(
    tmp_path: Path, slots: SharedSlots, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "store")
    rows = {name: Rows(slots)(i) for i, name in enumerate(IDS)}
    monkeypatch.setattr(
        CommitProcesses, "schedule", lambda self, *task: schedule(self, partial(signalled, number), *task)
    )
    with BackgroundShardWriter(store, 1, slots) as writer:
        ((work, _),) = writer.leases(store.missing_shards())
        writer.write(EncodedShard(work, "a machine", rows, dict.fromkeys(rows, "hash")))
        writer.wait()
    store.catalog.refresh()
    assert store.clip_ids == tuple(IDS)
    assert verify(store.path).ok


def signalled(number: signal.Signals, task: Callable[..., None], *args: object) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.5)
    task(*args)


def test_closing_the_pool_does_not_wait_for_its_children(slots: SharedSlots) -> None:
    with CommitProcesses(slots, 2, "zarr") as committer:
        committer.schedule(time.sleep, 60)
        started = time.monotonic()
    assert time.monotonic() - started < 3


@pytest.mark.slow
def test_an_idle_child_that_is_killed_is_replaced_and_one_that_cannot_start_is_reported(
    tmp_path: Path, slots: SharedSlots
) -> None:
    store, rows = make(tmp_path / "store"), {"a": Rows(slots)(0)}
    with (
        CommitProcesses(slots, 1, "no format") as committer,
        pytest.raises(ChildProcessError, match="writing cannot be started"),
    ):
        write(store, rows, committer)
    assert store.clip_ids == ()
    with CommitProcesses(slots, 1, "zarr") as committer:
        pid = committer.schedule(os.getpid).result()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid))
        write(store, rows, committer)
    assert store.clip_ids == ("a",)


def test_interrupted_shutdown_leaves_no_children_or_leases(
    tmp_path: Path, slots: SharedSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "store")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    writer = BackgroundShardWriter(store, 1, slots)
    next(writer.leases(store.missing_shards()))
    monkeypatch.setattr(writer._writing, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.__exit__()
    assert not [child for child in set(psutil.Process().children()) - before if "spawn_main" in str(child.cmdline())]
    with store.lease(0):
        pass


def test_children_end_with_their_parent() -> None:
    code = (
        "import os, time\n"
        "from egopatch.extract.children.slots import SharedSlots\n"
        "from egopatch.extract.writing.commit_processes import CommitProcesses\n"
        "if __name__ == '__main__':\n"
        "    pool = CommitProcesses(SharedSlots(2, 100, 'rows', ''), 2, 'zarr')\n"
        "    [pool.schedule(time.sleep, 60) for _ in range(2)]\n"
        "    print(pool.schedule(os.getppid), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        children = psutil.Process(parent.pid).children()
        assert len(children) >= 2
        parent.kill()
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left
