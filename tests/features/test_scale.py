"""Memory and time that an open store takes for each clip; `benchmarks/scale.py` measures a million clips."""

import tracemalloc
from pathlib import Path

from egopatch.features import create_store, open_store
from egopatch.features.state.counts import StoreCounts, count_clips, read_ledger
from egopatch.features.state.ledger import ClipRecord, Commit, commit_record, raw_ledger_journal
from egopatch.features.storage.folder import LocalStorage
from egopatch.features.values.dtypes import spec_row_bytes
from egopatch.features.values.spec import StoreSpec
from tests.features.conftest import FINGERPRINT

SPEC = StoreSpec.for_patches(1, (1, 1), 1, shard=64)
SHARDS = 200


def committed(root: Path) -> int:
    """A store whose ledger says that it is full; returns the number of clips."""
    ids = [f"video{n // 10:07d}|P1|{n}|{n + 5}" for n in range(SHARDS * SPEC.shard)]
    store = create_store(root, SPEC, FINGERPRINT, ids)
    row, lines = spec_row_bytes(SPEC), []
    for shard in range(SHARDS):
        rows = range(shard * SPEC.shard, (shard + 1) * SPEC.shard)
        clips = {ids[n]: ClipRecord(n, {a.name: n for a in SPEC.arrays}, f"{n // 10:064x}") for n in rows}
        files = {f"{array.name}/c.{shard}": (row * SPEC.shard, shard) for array in SPEC.arrays}  # four times the rows
        lines.append(commit_record(shard, clips, files, store.fingerprint.digest, {}, row))
    raw_ledger_journal(LocalStorage(root)).rewrite(lambda _: lines)
    return len(ids)


def test_an_open_store_takes_few_bytes_per_clip(tmp_path: Path) -> None:
    clips = committed(tmp_path / "store")
    tracemalloc.start()
    try:
        store = open_store(tmp_path / "store")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.clip_ids == store.planned_ids
    assert held / clips < 420
    assert peak / clips < 450  # a million under half a gigabyte, as much as torch and the rest take
    record = store.catalog.clip_records([store.planned_ids[777]])[0]
    assert (record.row, record.source, record.checksums["cls"]) == (777, f"{77:064x}", 777)


def test_a_clip_is_found_in_its_commit_without_comparing_it_with_others() -> None:
    class Counted(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

    ids = tuple(Counted(n) for n in range(100))
    commit = Commit(0, ids, tuple(range(100)), {}, ("hash",) * 100, {}, "", {}, 0, machines=("here",) * 100)
    assert [(commit.clip(str(n)).row, commit.machine_of(str(n))) for n in range(100)] == [
        (n, "here") for n in range(100)
    ]
    assert Counted.compared <= 2 * 100


def test_count_clips_matches_the_ledger(tmp_path: Path) -> None:
    clips = committed(tmp_path / "store")
    nbytes = 4 * clips * spec_row_bytes(SPEC)
    counts = count_clips(tmp_path / "store", read_ledger(tmp_path / "store"))
    assert counts == StoreCounts(clips, clips, 0, 0, nbytes, FINGERPRINT.digest)
