"""Threads reading one store wait for each other only when they need the same file; errors keep their type."""

import errno
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egopatch.features import DamagedStore, Store, StoreError, create_store, open_store
from egopatch.features.state.catalog import Catalog
from egopatch.features.storage import objects
from egopatch.features.storage.folder import LocalFile
from egopatch.features.tools.repair import repair
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill, maker
from tests.features.faults import limited

WAIT_S = 20.0  # only a test that fails waits this long


@pytest.fixture
def store(make: Callable[..., Store]) -> Store:
    """A full store of which nothing has been read."""
    fill(make())
    return open_store(make().path)


def test_different_shards_are_opened_at_the_same_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file_format = type(store._reader._file_format)
    both = threading.Barrier(2)
    opened: list[int] = []
    plain = file_format.open

    def meet(self, files, spec, shard, index=None):  # type: ignore[no-untyped-def]
        opened.append(shard)
        both.wait(WAIT_S)
        return plain(self, files, spec, shard, index)

    monkeypatch.setattr(file_format, "open", meet)
    with ThreadPoolExecutor(4) as pool:
        # Two threads want the one shard, two the other.
        found = list(pool.map(lambda name: store.read([name]).patches[0], [IDS[0], IDS[4], IDS[1], IDS[5]]))
    assert sorted(opened) == [0, 1]
    for row, index in zip(found, (0, 4, 1, 5), strict=True):
        assert np.array_equal(row, clip(index)["patches"].half())


def test_a_shard_that_cannot_be_opened_is_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file_format = type(store._reader._file_format)
    plain, failures = file_format.open, [DamagedStore("the network is down")] * 2

    def fail_at_first(*args, **options):  # type: ignore[no-untyped-def]
        if failures:
            raise failures.pop()
        return plain(*args, **options)

    monkeypatch.setattr(file_format, "open", fail_at_first)
    with pytest.raises(DamagedStore, match="the network is down"):
        store.read([IDS[0]])
    failures.clear()
    assert len(store.read([IDS[0]]).cls) == 1


def test_reads_continue_while_another_thread_refreshes_the_catalog(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = maker(f"{bucket}/store", "zarr")
    fill(make(), skip=(IDS[3],))
    monkeypatch.setattr(objects, "_TAIL", 16 * SPEC.shard + 4)  # the index alone: rows take a request each
    store = open_store(make().path)
    store.read([IDS[0]])
    store.read([IDS[4]])
    open_store(store.path).write_shard(0, {IDS[3]: clip(3)}, {IDS[3]: "sha256:3"})  # discards the files just opened
    refreshing, read = threading.Event(), threading.Event()
    plain = Catalog.refresh

    def held(self: Catalog, shard: int | None = None) -> None:
        refreshing.set()
        assert read.wait(WAIT_S)
        plain(self, shard)

    monkeypatch.setattr(Catalog, "refresh", held)
    with ThreadPoolExecutor(3) as pool:
        rewritten = [pool.submit(store.read, [name]) for name in (IDS[0], IDS[1])]
        assert refreshing.wait(WAIT_S)
        assert len(pool.submit(store.read, [IDS[4]]).result(WAIT_S).cls) == 1
        read.set()
        for place, reading in enumerate(rewritten):
            assert np.array_equal(reading.result(WAIT_S).patches[0], clip(place)["patches"].half())


def test_a_file_with_a_stale_handle_is_not_damaged(
    make_local: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of files forgets a file that another machine has replaced."""
    fill(make_local())
    store, later = open_store(make_local().path), open_store(make_local().path)
    store.read([IDS[0]])
    preadv, stale = os.preadv, lambda handle: os.fstat(handle).st_nlink == 0

    def refuse(handle: int, *args: Any) -> int:
        if stale(handle):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(handle, *args)

    monkeypatch.setattr(os, "preadv", refuse)
    replaces = later.catalog.ledger.versions([IDS[0]])
    later.write_shard(0, {IDS[0]: clip(50)}, {IDS[0]: "sha256:50"}, replaces=replaces)
    assert np.array_equal(store.read([IDS[0]]).patches[0], clip(50)["patches"].half())
    stale = lambda handle: True  # noqa: E731
    with pytest.raises(StoreError, match=r"cannot be read \(Stale file handle\); check the connection to") as caught:
        store.read([IDS[0]])
    assert type(caught.value) is StoreError


def test_ctrl_c_while_opening_a_shard_stays_a_keyboard_interrupt(store: Store) -> None:
    class Interrupted(dict):
        def __setitem__(self, *_: object) -> None:
            raise KeyboardInterrupt

    store._reader._indexes = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        store.read([IDS[0]])
    store._reader._indexes = {}
    assert np.array_equal(store.read([IDS[0]]).patches[0], clip(0)["patches"].half())


def test_unreachable_compressed_rows_are_not_reported_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "store", replace(SPEC, codec="zstd"), FINGERPRINT, IDS)
    fill(store)
    store.read(IDS)

    def unreachable(*args: object) -> bytes:
        raise StoreError("the server cannot be reached")

    monkeypatch.setattr(LocalFile, "read", unreachable)
    with pytest.raises(StoreError, match=r"^the server cannot be reached"):
        store.read(IDS)


def test_a_shard_is_reopened_after_a_repair_renumbers_the_ledger(make_local: Callable[..., Store]) -> None:
    store = make_local(IDS[:4])
    fill(store)
    store.read(IDS[:4])
    (store.path / "ledger.jsonl").write_bytes(b"")
    repair(store.path)
    rows = {name: clip(50 + n) for n, name in enumerate(IDS[:4])}
    open_store(store.path).write_shard(0, rows, dict.fromkeys(rows, "hash"))
    store.catalog.refresh()
    assert np.array_equal(store.read(IDS[:1]).patches[0], clip(50)["patches"].half())


def test_ids_may_come_from_a_generator(make_local: Callable[..., Store]) -> None:
    store = make_local(IDS[:4])
    fill(store)
    whole = store.read(IDS[:3])
    assert np.array_equal(store.read(name for name in IDS[:3]).patches, whole.patches)
    assert np.array_equal(store.to_numpy(iter(IDS[:3]))["patches"], whole.patches.float())
    assert tuple(store.sources(iter(IDS[:3]))) == tuple(IDS[:3])
    with pytest.raises(StoreError, match="does not record start and end of 3 clips"):  # read to the end
        store.video_times(iter(IDS[:3]))


def test_a_store_of_many_shards_keeps_to_the_limit_of_open_files(tmp_path: Path) -> None:
    ids = tuple(str(n) for n in range(40))
    store = create_store(tmp_path / "store", replace(SPEC, shard=1), FINGERPRINT, ids)
    fill(store)
    with limited(resource.RLIMIT_NOFILE, 128):
        assert len(open_store(store.path).read(ids).cls) == 40
