"""The commit protocol: write -> announce -> sync -> rename -> sync folder -> read back and compare -> record.

In object storage, where nothing is replaced: write -> upload under new names -> compare -> record, if nobody has
recorded anything of the shard meanwhile. Killed at any point, the shard's earlier rows are still there and the new ones
are either all committed or not at all.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from egopatch.features.formats.interface import Blocks, Format
from egopatch.features.io.files import crc32c, file_sum_of
from egopatch.features.state.ledger import ClipRecord, announce, commit, ledger_journal
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.journal import Position
from egopatch.features.values.dtypes import row_bytes
from egopatch.features.values.errors import DamagedStore
from egopatch.features.values.spec import ArraySpec, StoreSpec


@dataclass(frozen=True)
class Target:
    """Where a shard goes: the store's storage, shape, file format, fingerprint's digest and bytes of a row."""

    storage: Storage
    spec: StoreSpec
    files: Format
    fingerprint: str
    row_bytes: int


def commit_shard(
    target: Target,
    shard: int,
    rows: Mapping[str, int],
    blocks: Blocks,
    sources: Mapping[str, str],
    errors: Mapping[str, float],
    after: Position | None,
) -> None:
    """Commit a shard that afterwards consists of exactly `rows`. The caller owns the shard.

    Args:
        target: the store.
        shard: its number.
        rows: id -> row of the store, in rising order.
        blocks: each array's rows, in the order of `rows`.
        sources: id -> hash of what it came from.
        errors: what storing in fewer bits cost; read when `blocks` is used up.
        after: how far the ledger had been read when `rows` were put together.

    Raises:
        Overtaken: somebody else has committed clips of the shard since; nothing was committed here.
        DamagedStore: the disk does not give back what was written.
        OSError: the disk is full.
    """
    storage, ledger = target.storage, ledger_journal(target.storage)
    slots = [row % target.spec.shard for row in rows.values()]
    sums: dict[str, dict[str, int]] = {name: {} for name in rows}
    with storage.staging(shard) as folder:
        staged = target.files.stage(folder, target.spec, shard, slots, _summed(blocks, sums))
        files = {name: file_sum_of(path) for name, path in staged.items()}
        if storage.in_place:
            ledger.append(announce(shard, files), after)
        attempt = storage.publish(shard, staged, files)
    if storage.in_place:
        _read_back(target, shard, rows, sums)
    clips = {name: ClipRecord(row, sums[name], sources[name]) for name, row in rows.items()}
    ledger.append(commit(shard, clips, files, target.fingerprint, errors, target.row_bytes, attempt), after)


def _summed(blocks: Blocks, sums: Mapping[str, dict[str, int]]) -> Blocks:
    """The rows as they are, taking each one's checksum while it is in memory."""

    def rows_of(array: ArraySpec, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for row, checksums in zip(rows, sums.values(), strict=True):
            checksums[array.name] = crc32c(row)
            yield row

    for array, rows in blocks:
        yield array, rows_of(array, rows)


def _read_back(target: Target, shard: int, rows: Mapping[str, int], sums: Mapping[str, Mapping[str, int]]) -> None:
    opened = target.files.open(target.storage.shard_files(shard, ""), target.spec, shard)
    for array in target.spec.arrays:
        buffer = np.empty(row_bytes(array), np.uint8)
        for name, row in rows.items():
            chunk = opened.find(array, row % target.spec.shard)
            if chunk.read_into(buffer) != sums[name][array.name]:
                raise DamagedStore(
                    f"{chunk.file.path}: {array.name} of clip {name!r} read back differs from what was written; "
                    "check the disk: nothing was committed"
                )
