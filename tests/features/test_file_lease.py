"""One owner for each shard; the leases of killed processes expire."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from egopatch.features import ShardOwned, Store, create_store, open_store
from egopatch.features.io.file_lease import Owner, hold, lease_path
from egopatch.features.tools.verify import verify
from tests.features.conftest import FINGERPRINT, FORMATS, IDS, SPEC, clip

SPAWN = multiprocessing.get_context("spawn")


def _hold_until_signalled(root: Path, pipe: Connection) -> None:
    with hold(root, 0):
        pipe.send("held")
        pipe.recv()


def _share_the_work(root: Path, format: str, pipe: Connection) -> None:
    """What one of several workers does: take whole shards that nobody owns, compute what is left of them."""
    store = open_store(root)
    pipe.send("ready")
    pipe.recv()
    wrote = 0
    while missing := store.missing_shards():
        for work in missing:
            try:
                with store.lease(work.shard) as left:
                    rows = {name: clip(int(name)) for name in left}
                    store.write_shard(work.shard, rows, dict.fromkeys(rows, "x"))
                    wrote += len(rows)
            except ShardOwned:
                continue
        store.catalog.refresh()
    pipe.send(wrote)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)


def test_a_second_process_is_told_who_owns_what(store: Store) -> None:
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=_hold_until_signalled, args=(store.path, theirs))
    child.start()
    assert ours.recv() == "held"
    with pytest.raises(ShardOwned, match=rf"shard 0 of .* is held by process {child.pid} on "):
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})
    store.write_shard(1, {IDS[4]: clip(4)}, {IDS[4]: "sha256:4"})  # another shard is free
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})  # the dead owner lost it, nobody cleared anything
    assert store.clip_ids == (IDS[0], IDS[4])
    ours.close()
    theirs.close()


def test_a_process_number_used_again_is_not_the_owner(store: Store) -> None:
    mine = Owner.this_process()
    assert mine.may_be_alive()
    assert not Owner(mine.host, mine.pid, mine.started - 3600).may_be_alive()
    assert not Owner(mine.host, 2**22 + 1, mine.started).may_be_alive()
    assert Owner("another-host", 2**22 + 1, mine.started).may_be_alive()


def test_a_lease_that_a_crash_left_unfinished_is_free(store: Store) -> None:
    with store.lease(2):
        pass
    lease_path(store.path, 2).write_text('{"host": "x"')
    with store.lease(2):
        assert lease_path(store.path, 2).exists()
    assert not lease_path(store.path, 2).exists()


def test_one_process_has_one_lease(store: Store) -> None:
    other = open_store(store.path)
    with store.lease(0), pytest.raises(ShardOwned, match=f"process {os.getpid()} "), other.lease(0):
        pass


def test_ctrl_c_gives_the_shard_back(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.lease(0):
        raise KeyboardInterrupt
    with store.lease(0):
        assert store.missing_shards()[0].shard == 0


@pytest.mark.parametrize("format", FORMATS)
def test_writers_share_the_work_while_a_reader_reads(tmp_path: Path, format: str) -> None:
    ids = tuple(str(n) for n in range(24))
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, ids, format)
    pipes = [SPAWN.Pipe() for _ in range(2)]
    children = [SPAWN.Process(target=_share_the_work, args=(store.path, format, theirs)) for _, theirs in pipes]
    for child in children:
        child.start()
    for ours, _ in pipes:
        assert ours.recv() == "ready"
    for ours, _ in pipes:
        ours.send("go")
    looks = 0
    while len(store.clip_ids) < len(ids):
        store.catalog.refresh()
        reopened = open_store(store.path)
        for name in reopened.clip_ids:
            assert torch.equal(reopened.read([name]).patches[0], clip(int(name))["patches"].half())
        assert verify(store.path).ok
        looks += 1
    wrote = [ours.recv() for ours, _ in pipes]
    for child in children:
        child.join()
        assert child.exitcode == 0
    for ours, theirs in pipes:
        ours.close()
        theirs.close()
    assert looks > 0
    assert sum(wrote) == len(ids)  # nothing lost, nothing done twice
    assert open_store(store.path).clip_ids == ids
    assert verify(store.path).ok
