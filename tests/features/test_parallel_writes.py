"""Threads and processes that write different shards of one store at the same time."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

from egopatch.features import ShardOwned, Store, create_store, open_store
from egopatch.features.state.ledger import Commit
from egopatch.features.storage.folder import LocalStorage
from egopatch.features.tools.verify import verify
from egopatch.features.values.location import Location
from egopatch.features.values.spec import StoreSpec
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip

SHARDS = 24
SPAWN = multiprocessing.get_context("spawn")


def write(store: Store, shard: int, *rows: int) -> None:
    named = {store.planned_ids[row]: clip(row) for row in rows}
    store.write_shard(shard, named, dict.fromkeys(named, "hash"))


def test_a_shard_is_committed_while_another_is_being_written(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS, format)
    staged, committed, publish = threading.Event(), threading.Event(), LocalStorage.publish

    def held_up(self: LocalStorage, shard: int, *rest: object) -> str:
        if shard == 0:
            staged.set()
            assert committed.wait(60)
        return publish(self, shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStorage, "publish", held_up)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(write, store, 0, 0, 1, 2, 3)
        assert staged.wait(60)
        write(store, 1, 4, 5, 6, 7)
        assert store.clip_ids == IDS[4:8]
        committed.set()
        first.result()
    assert store.clip_ids == IDS[:8]
    assert verify(store.path).ok


def test_a_ledger_read_by_another_thread_does_not_hide_a_conflict(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process commits to a shard after this one has decided what to write to it; a thread then reads on."""
    monkeypatch.setattr(LocalStorage, "lease", lambda self, shard: nullcontext())
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS, format)
    other, staging, entered = open_store(store.path), LocalStorage.staging, threading.Event()

    def interrupted(self: LocalStorage, shard: int) -> object:
        if shard == 0 and not entered.is_set():
            entered.set()
            write(other, 0, 1)
            with ThreadPoolExecutor(1) as thread:
                thread.submit(write, store, 1, 4).result()
        return staging(self, shard)

    monkeypatch.setattr(LocalStorage, "staging", interrupted)
    write(store, 0, 0)
    assert store.clip_ids == (IDS[0], IDS[1], IDS[4])
    assert verify(store.path).ok
    expected = torch.stack([clip(row)["patches"] for row in (0, 1, 4)]).half()
    assert torch.equal(open_store(store.path).read([IDS[0], IDS[1], IDS[4]]).patches, expected)


def test_a_commit_that_arrives_while_the_ledger_is_looked_through_disturbs_nobody(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS, format)
    write(store, 0, 0)
    decode, count = Commit.origins_by_id, Commit.nbytes.fget  # type: ignore[attr-defined]
    due = [4]

    def after_a_commit(commit: Commit, answer: Callable[[Commit], object]) -> object:
        while due:
            row = due.pop()
            with ThreadPoolExecutor(1) as thread:
                thread.submit(write, store, row // SPEC.shard, row).result()
        return answer(commit)

    monkeypatch.setattr(Commit, "origins_by_id", lambda self: after_a_commit(self, decode))
    assert IDS[0] in store.origins()
    due.append(8)
    monkeypatch.setattr(Commit, "nbytes", property(lambda self: after_a_commit(self, count)))
    assert store.nbytes > 0
    assert store.clip_ids == (IDS[0], IDS[4], IDS[8])


def test_four_threads_write_many_shards_without_loss(tmp_path: Path, format: str) -> None:
    spec = StoreSpec.for_patches(frames=2, grid=(2, 3), width=8, dtype="float16", shard=2)
    store = create_store(tmp_path / "store", spec, FINGERPRINT, [f"c{n}" for n in range(2 * SHARDS)], format)
    with ThreadPoolExecutor(4) as threads:
        # Each shard in two commits, the second of which keeps the row of the first.
        for row in (0, 1):
            list(threads.map(lambda shard, row=row: write(store, shard, 2 * shard + row), range(SHARDS)))
    assert store.clip_ids == store.planned_ids
    assert verify(store.path).ok
    assert len(open_store(store.path).clip_ids) == 2 * SHARDS


def share_the_work(place: Location) -> int:
    """One of several workers: lease shards that nobody holds, write the clips that they still miss, and count these."""
    store, wrote = open_store(place), 0
    while missing := store.missing_shards():
        for work in missing:
            with suppress(ShardOwned), store.lease(work.shard) as left:
                rows = {name: clip(int(name)) for name in left}
                store.write_shard(work.shard, rows, dict.fromkeys(rows, "x"))
                wrote += len(rows)
        store.catalog.refresh()
    return wrote


@pytest.mark.slow
def test_two_processes_share_the_work_while_a_reader_reads(make: Callable[..., Store]) -> None:
    store = make(tuple(str(n) for n in range(24)))
    with ProcessPoolExecutor(2, SPAWN, initializer=SPAWN.Barrier(2).wait) as pool:
        workers = [pool.submit(share_the_work, store.path) for _ in range(2)]
        while len(store.clip_ids) < len(store.planned_ids):
            assert not any(worker.done() and worker.exception() for worker in workers)
            store.catalog.refresh()
            reopened = open_store(store.path)
            for name in reopened.clip_ids:
                assert torch.equal(reopened.read([name]).patches[0], clip(int(name))["patches"].half())
            assert verify(store.path).ok
    assert sum(worker.result() for worker in workers) == len(store.planned_ids)  # nothing lost, nothing done twice
    assert open_store(store.path).clip_ids == store.planned_ids
    assert verify(store.path).ok
