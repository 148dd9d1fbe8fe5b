"""Replaced rows: readers, killed writers and second writers see the old row, the new one or none."""

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from egopatch.features import AbsentClip, ArraySpec, Failure, ShardWork, Store, create_store, open_store
from egopatch.features.state.counts import count_clips, read_ledger
from egopatch.features.state.ledger import Commit, raw_ledger_journal
from egopatch.features.state.origin import Origin
from egopatch.features.storage.folder import LocalStorage
from egopatch.features.tools.verify import verify
from tests.features.conftest import FINGERPRINT, FORMATS, IDS, SPEC, clip
from tests.features.faults import fork, killed_at

FIRST = IDS[:4]  # those of shard 0
ORIGINS = {name: Origin("videos/a.mp4", 7, float(n), n + 5.0) for n, name in enumerate(FIRST)}
MOVED = Origin("videos/a.mp4", 7, 0.5, 5.5)
Make = Callable[..., Store]
WAIT_S = 30


def filled(make: Make) -> Store:
    """A store whose shard 0 is complete."""
    store = make(FIRST)
    rows = {name: clip(n) for n, name in enumerate(FIRST)}
    store.write_shard(0, rows, dict.fromkeys(rows, "hash"), {}, ORIGINS)
    return open_store(store.path)


@pytest.fixture
def store(make: Make) -> Store:
    return filled(make)


def work_on(store: Store, *ids: str) -> ShardWork:
    (work,) = store.missing_shards(replace=ids)
    assert work.ids == ids
    return work


def refresh(store: Store, seed: int = 90, work: ShardWork | None = None) -> None:
    """Give the first clip another row, made of another stretch."""
    work = work or work_on(store, FIRST[0])
    store.write_shard(0, {FIRST[0]: clip(seed)}, {FIRST[0]: "new"}, {}, {FIRST[0]: MOVED}, work.replaces)


def patches(seed: int) -> torch.Tensor:
    return clip(seed)["patches"].to(torch.float16)


def check(path: Path | str, seeds: dict[str, int]) -> None:
    """Whether the store holds exactly these clips, with these values."""
    store = open_store(path)
    assert store.clip_ids == tuple(seeds)
    assert torch.equal(store.read(store.clip_ids).patches, torch.stack([patches(seed) for seed in seeds.values()]))
    report = verify(path)
    assert report.ok, report.faults
    assert count_clips(path, read_ledger(path)).committed == len(seeds)


OLD = {name: n for n, name in enumerate(FIRST)}


def test_a_row_is_replaced_together_with_its_origin(store: Store) -> None:
    refresh(store)
    check(store.path, OLD | {FIRST[0]: 90})
    found = open_store(store.path)
    assert found.origins() == read_ledger(store.path).origins() == ORIGINS | {FIRST[0]: MOVED}
    assert found.sources(FIRST[:2]) == {FIRST[0]: "new", FIRST[1]: "hash"}


def test_every_row_of_a_shard_is_replaced(store: Store) -> None:
    work = work_on(store, *FIRST)
    store.write_shard(
        0, {name: clip(90 + n) for n, name in enumerate(FIRST)}, dict.fromkeys(FIRST, "new"), {}, {}, work.replaces
    )
    check(store.path, {name: 90 + n for n, name in enumerate(FIRST)})
    assert set(open_store(store.path).origins().values()) == {None}


def test_a_clip_that_fails_to_re_encode_loses_its_old_row(store: Store) -> None:
    work = work_on(store, *FIRST[:2])
    rows, failures = {FIRST[1]: clip(91)}, {FIRST[0]: Failure("truncated")}
    store.write_shard(0, rows, {FIRST[1]: "new"}, failures, {}, work.replaces)
    check(store.path, {name: n for name, n in (OLD | {FIRST[1]: 91}).items() if name != FIRST[0]})
    assert set(open_store(store.path).quarantine) == {FIRST[0]}


def test_a_committed_clip_is_not_replaced_by_mistake(store: Store) -> None:
    with pytest.raises(ValueError, match="is already committed"):
        store.write_shard(0, {FIRST[0]: clip(90)}, {FIRST[0]: "new"})
    check(store.path, OLD)


def test_the_second_of_two_refreshing_jobs_keeps_the_first_jobs_row(store: Store) -> None:
    other = open_store(store.path)
    mine, theirs = work_on(store, FIRST[0]), work_on(other, FIRST[0])
    refresh(store, 90, mine)
    refresh(other, 91, theirs)
    other.write_shard(0, {}, {}, {FIRST[0]: Failure("late")}, {}, theirs.replaces)
    check(store.path, OLD | {FIRST[0]: 90})
    assert not open_store(store.path).quarantine


@pytest.mark.parametrize("times", [1, 2])
def test_a_row_that_is_replaced_while_it_is_read_is_never_a_mixture(
    store: Store, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    reader = open_store(store.path)._reader
    original, arrays = reader._read_committed, []
    seeds = iter(range(90, 90 + times))

    def read(target: object, name: str, record: object, array: ArraySpec) -> None:
        # One array has been read, the others have not; the next one fails, and all are read again.
        if len(arrays) in (1, 3) and (seed := next(seeds, None)):
            refresh(store, seed)
            reader.close()
        arrays.append(array.name)
        original(target, name, record, array)

    monkeypatch.setattr(reader, "_read_committed", read)
    rows = {array: np.empty(array.shape, array.dtype) for array in SPEC.arrays}
    record = reader._catalog.clip_records(FIRST[:1])[0]
    reader.read_into([(row.reshape(-1).view(np.uint8), array) for array, row in rows.items()], FIRST[0], record)
    expected = open_store(store.path).read(FIRST[:1]).tensors()
    for array, row in rows.items():
        assert torch.equal(torch.from_numpy(row), expected[array.name][0]), array.name


def test_a_reader_of_a_removed_clip_gets_a_clear_error(store: Store) -> None:
    reader = open_store(store.path)
    work = work_on(store, FIRST[0])
    store.write_shard(0, {}, {}, {FIRST[0]: Failure("truncated")}, {}, work.replaces)
    with pytest.raises(AbsentClip, match="1 requested clip is missing"):
        reader.read(FIRST)
    assert torch.equal(reader.read(FIRST[1:]).patches, torch.stack([patches(n) for n in (1, 2, 3)]))


def test_threads_that_share_a_store_find_a_row_that_one_of_them_is_refreshing(
    make_local: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread has read that a row is removed, and waits for the new one; another asks for the clip meanwhile."""
    store = filled(make_local)
    reader, waiting, go_on = open_store(store.path), threading.Event(), threading.Event()
    work, refreshed, plain = work_on(store, FIRST[0]), [False], LocalStorage.wait_for_commit

    def wait(storage: LocalStorage, shard: int) -> None:
        waiting.set()
        assert go_on.wait(WAIT_S)
        plain(storage, shard)

    def publish_late(*args: Any) -> str:
        if not refreshed[0]:
            refreshed[0] = True
            pool.submit(reader.catalog.refresh)
            assert waiting.wait(WAIT_S)
            lookups.extend(pool.submit(look, [FIRST[0]]) for look in (reader.sources, reader.video_times, reader.read))
            time.sleep(0.2)  # the lookups have begun, and must not have ended
            assert not any(lookup.done() for lookup in lookups)
            go_on.set()
        return publish(*args)

    lookups: list[Future] = []
    publish = LocalStorage.publish
    monkeypatch.setattr(LocalStorage, "wait_for_commit", wait)
    monkeypatch.setattr(LocalStorage, "publish", publish_late)
    with ThreadPoolExecutor(4) as pool:
        refresh(store, 90, work)
        sources, times, tokens = (lookup.result(WAIT_S) for lookup in lookups)
    assert sources == {FIRST[0]: "new"}
    assert torch.equal(times[0], clip(90)["timestamps"].double() + 0.5)
    assert torch.equal(tokens.patches[0], patches(90))


def test_a_row_removed_while_versions_are_looked_up_is_no_key_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, decode = store.catalog.ledger, Commit.origins_by_id

    def removing(commit: Commit) -> dict[str, Origin | None]:
        ledger.clips.pop(FIRST[0], None)
        return decode(commit)

    monkeypatch.setattr(Commit, "origins_by_id", removing)
    assert ledger.versions(FIRST[:2])[FIRST[0]].origin == ORIGINS[FIRST[0]]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_kill_at_any_moment_loses_no_other_row(tmp_path: Path, format: str) -> None:
    whole = filled(lambda ids: create_store(tmp_path / "whole", SPEC, FINGERPRINT, ids, format))
    ends = set()
    for point in itertools.count():
        root = tmp_path / f"killed-{point}"
        shutil.copytree(whole.path, root)

        def action(root: Path = root, point: int = point) -> None:
            killed_at(point)()
            refresh(open_store(root))

        code = fork(action).wait()
        found = open_store(root)
        report = verify(root)
        assert report.ok, report.faults
        ids = found.clip_ids
        assert set(FIRST[1:]) <= set(ids)
        rows = found.read(ids).patches
        for name, row in zip(ids, rows, strict=True):
            assert torch.equal(row, patches(OLD[name])) or (name == FIRST[0] and torch.equal(row, patches(90)))
        if FIRST[0] in ids:
            new = torch.equal(rows[0], patches(90))
            assert found.origins()[FIRST[0]] == (MOVED if new else ORIGINS[FIRST[0]])
            ends.add("new" if new else "old")
        else:
            ends.add("absent")
        for work in found.missing_shards(
            replace=[name for name, o in found.origins().items() if o == ORIGINS[FIRST[0]]]
        ):
            refresh(found, work=work)
        check(root, OLD | {FIRST[0]: 90})
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert ends == {"old", "absent", "new"}


@pytest.mark.parametrize("opened", ["before", "meanwhile"])
def test_a_reader_at_any_step_of_a_commit_finds_the_clip(
    store: Store, monkeypatch: pytest.MonkeyPatch, opened: str
) -> None:
    """A reader reads at each step of a commit. In a folder, a reader that arrives while files change waits for it."""
    storage = type(store.catalog.storage)
    before, seen, readers = open_store(store.path), dict[str, str](), list[threading.Thread]()
    # Readers are on their way to the lock, or past it, when the files change.
    reached = {name: threading.Event() for name in ("staging", "committing", "publish", "end")}

    def look(step: str) -> None:
        reached[step].set()
        found = before if opened == "before" else open_store(store.path)
        with found:  # it opens the files anew each time
            row = found.read([FIRST[0]]).patches[0]
        seen[step] = "new" if torch.equal(row, patches(90)) else "old" if torch.equal(row, patches(0)) else "mixed"

    def start(step: str) -> None:
        readers.append(threading.Thread(target=look, args=(step,)))
        readers[-1].start()
        reached[step].wait(60)

    for name in ("staging", "committing", "publish"):
        original = getattr(storage, name)

        def looking(self: object, *args: object, original: Callable = original, step: str = name) -> object:
            start(step)
            if step != "publish":
                readers[-1].join(60)
            return original(self, *args)

        monkeypatch.setattr(storage, name, looking)
    refresh(store)
    start("end")
    for reader in readers:
        reader.join(60)
    assert (seen["staging"], seen["committing"], seen["end"]) == ("old", "old", "new")
    assert seen["publish"] in ("old", "new")


def test_a_reader_does_not_wait_for_a_killed_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(lambda ids: create_store(tmp_path / "store", SPEC, FINGERPRINT, ids))

    def dies() -> None:
        monkeypatch.setattr(LocalStorage, "publish", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        refresh(open_store(store.path))

    assert fork(dies).wait() == -signal.SIGKILL
    assert open_store(store.path).clip_ids == FIRST[1:]
    refresh(open_store(store.path), work=ShardWork(0, FIRST[:1]))
    check(store.path, OLD | {FIRST[0]: 90})


def test_a_reader_waits_for_consecutive_replacements_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(lambda ids: create_store(tmp_path / "store", SPEC, FINGERPRINT, ids))
    refresh(store)
    ledger = raw_ledger_journal(store.catalog.storage)
    drop, announce, commit = (line.entry for line in ledger.read().lines[-3:])
    ledger.append(drop)
    meanwhile = iter([[announce, commit, drop], [announce, commit]])

    def wait(self: LocalStorage, shard: int) -> None:
        for record in next(meanwhile):
            ledger.append(record)

    monkeypatch.setattr(LocalStorage, "wait_for_commit", wait)
    assert torch.equal(open_store(store.path).read(FIRST[:1]).patches[0], patches(90))


def test_a_reader_waits_for_replacements_that_begin_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(lambda ids: create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS[:5]))
    second = IDS[4]  # of shard 1
    store.write_shard(1, {second: clip(1)}, {second: "hash"}, {}, {second: ORIGINS[FIRST[0]]})
    refresh(store)
    work = work_on(store, second)
    store.write_shard(1, {second: clip(91)}, {second: "new"}, {}, {second: MOVED}, work.replaces)
    ledger = raw_ledger_journal(store.catalog.storage)
    lines = [line.entry for line in ledger.read().lines]
    (drop, announce, commit), (*then, last) = lines[-6:-3], lines[-3:]
    ledger.append(drop)
    # While the reader waits for shard 0, the writer goes on to shard 1.
    meanwhile = {0: iter([[announce, commit, *then]]), 1: iter([[last]])}

    def wait(self: LocalStorage, shard: int) -> None:
        for record in next(meanwhile[shard]):
            ledger.append(record)

    monkeypatch.setattr(LocalStorage, "wait_for_commit", wait)
    check(store.path, OLD | {FIRST[0]: 90, second: 91})


def test_a_clip_failing_to_re_encode_is_always_committed_or_quarantined(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()

    def looking(self: object, record: dict, after: object = None) -> object:
        position = original(self, record, after)
        found = open_store(store.path)
        seen.append(FIRST[0] in found.clip_ids or FIRST[0] in found.quarantine)
        return position

    journal = type(raw_ledger_journal(store.catalog.storage))
    original = journal.append
    monkeypatch.setattr(journal, "append", looking)
    store.write_shard(0, {}, {}, {FIRST[0]: Failure("truncated")}, {}, work_on(store, FIRST[0]).replaces)
    assert len(seen) > 1
    assert all(seen)


def test_two_live_writers_refresh_one_clip_and_add_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hold the shard, because a lease was judged dead by mistake."""
    monkeypatch.setattr(LocalStorage, "lease", lambda self, shard: nullcontext())
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, FIRST)
    rows = {name: clip(n) for n, name in enumerate(FIRST[:3])}
    store.write_shard(0, rows, dict.fromkeys(rows, "hash"), {}, ORIGINS)
    one, two = open_store(store.path), open_store(store.path)
    work = next(w for w in one.missing_shards(replace=[FIRST[0]]) if w.shard == 0)
    committing, ready, go = LocalStorage.committing, threading.Event(), threading.Event()

    def paused(self: LocalStorage, shard: int) -> object:
        if threading.current_thread() is thread:
            ready.set()
            assert go.wait(60)
        return committing(self, shard)

    monkeypatch.setattr(LocalStorage, "committing", paused)
    thread = threading.Thread(target=refresh, args=(one, 90, work))
    thread.start()
    assert ready.wait(60)
    two.write_shard(0, {FIRST[3]: clip(3)}, {FIRST[3]: "hash"})
    go.set()
    thread.join()
    check(store.path, OLD | {FIRST[0]: 90})
