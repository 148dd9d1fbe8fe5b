"""The commit protocol: write -> sync -> announce -> rename -> sync folder -> read back and compare -> record.

Killed at any point, the shard's earlier rows are still there and the new ones are either all committed or not at all.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.dtypes import row_bytes
from features.durable import crc32c, file_sum_of, make_folder, put_in_place, remove_folder, sync_file
from features.errors import DamagedStore
from features.file_format import Blocks, Format
from features.journal import Journal
from features.ledger import ClipRecord, announce, commit
from features.spec import ArraySpec, StoreSpec


@dataclass(frozen=True)
class Target:
    """Where a shard goes: the store's folder, shape, file format, ledger, fingerprint's digest and bytes of a row."""

    root: Path
    spec: StoreSpec
    files: Format
    ledger: Journal
    fingerprint: str
    row_bytes: int


def commit_shard(
    target: Target,
    shard: int,
    rows: Mapping[str, int],
    blocks: Blocks,
    sources: Mapping[str, str],
    errors: Mapping[str, float],
) -> None:
    """Commit a shard that afterwards consists of exactly `rows`. The caller owns the shard.

    Args:
        target: the store.
        shard: its number.
        rows: id -> row of the store, in rising order.
        blocks: each array's rows, in the order of `rows`.
        sources: id -> hash of what it came from.
        errors: what storing in fewer bits cost; read when `blocks` is used up.

    Raises:
        DamagedStore: the disk does not give back what was written.
        OSError: the disk is full.
    """
    staging = target.root / "staging"
    for leftover in staging.glob(f"{shard:08d}-*"):  # of a writer that died: had it lived, it would own the shard
        remove_folder(leftover)
    folder = staging / f"{shard:08d}-{uuid.uuid4().hex}"
    slots = [row % target.spec.shard for row in rows.values()]
    sums: dict[str, dict[str, str]] = {name: {} for name in rows}
    make_folder(folder)
    try:
        staged = target.files.stage(folder, target.spec, shard, slots, _summed(blocks, sums))
        files = {name: file_sum_of(path) for name, path in staged.items()}
        for path in staged.values():
            sync_file(path)
        target.ledger.append(announce(shard, files))
        for name, path in staged.items():
            put_in_place(path, target.root / name)
    finally:
        remove_folder(folder)
    _read_back(target, shard, rows, sums)
    clips = {name: ClipRecord(row, sums[name], sources[name]) for name, row in rows.items()}
    target.ledger.append(commit(shard, clips, files, target.fingerprint, errors, target.row_bytes))


def _summed(blocks: Blocks, sums: Mapping[str, dict[str, str]]) -> Blocks:
    """The rows as they are, taking each one's checksum while it is in memory."""

    def rows_of(array: ArraySpec, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for row, checksums in zip(rows, sums.values(), strict=True):
            checksums[array.name] = f"{crc32c(row):08x}"
            yield row

    for array, rows in blocks:
        yield array, rows_of(array, rows)


def _read_back(target: Target, shard: int, rows: Mapping[str, int], sums: Mapping[str, Mapping[str, str]]) -> None:
    opened = target.files.open(target.root, target.spec, shard)
    for array in target.spec.arrays:
        buffer = np.empty(row_bytes(array), np.uint8)
        for name, row in rows.items():
            chunk = opened.find(array, row % target.spec.shard)
            if chunk.read_into(buffer) != sums[name][array.name]:
                raise DamagedStore(
                    f"{chunk.file.path}: {array.name} of clip {name!r} read back differs from what was written; "
                    "check the disk: nothing was committed"
                )
