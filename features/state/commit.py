"""The commit protocol: write -> announce -> sync -> rename -> sync folder -> read back and compare -> record.

In object storage, where nothing is replaced: write -> upload under new names -> compare -> record. After a kill at any
point, the shard's earlier rows are intact, and the new ones are either all committed or not at all.

Every record goes in on condition that nobody has recorded anything about the shard since its writer last read the
ledger, and in a folder one process at a time goes from the first record to the last. So two processes that both believe
they hold a shard's lease lose nothing: the second is refused, reads what the first has committed, and commits both.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from egopatch.features.formats.interface import Blocks, Format
from egopatch.features.io.files import crc32c, size_and_crc_of_file
from egopatch.features.state.ledger import ClipRecord, announce_record, commit_record, drop_record, ledger_journal
from egopatch.features.state.origin import Origin, encode_origins
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.journal import Position
from egopatch.features.values.dtypes import row_bytes
from egopatch.features.values.errors import DamagedStore, write_conflict
from egopatch.features.values.spec import ArraySpec, StoreSpec


@dataclass(frozen=True)
class CommitTarget:
    """The store that a shard is committed to: storage, spec, file format, digest of its fingerprint, bytes in a row."""

    storage: Storage
    spec: StoreSpec
    file_format: Format
    fingerprint: str
    row_bytes: int


def commit_shard(
    target: CommitTarget,
    shard: int,
    rows: Mapping[str, int],
    blocks: Blocks,
    sources: Mapping[str, str],
    origins: Mapping[str, Origin | None],
    machines: Mapping[str, str],
    errors: Mapping[str, float],
    after: Position | None,
    replaced: Sequence[str] = (),
) -> None:
    """Commit a shard that afterwards consists of exactly `rows`. The caller holds the shard's lease.

    Args:
        target: Store that receives the shard.
        shard: Number of the shard.
        rows: Id -> row of the store, in rising order.
        blocks: Rows of each array, in the order of `rows`.
        sources: Id -> hash of the video (or text) that was encoded.
        origins: Id -> stretch of video that was encoded, in the order of `rows`; None where it is not known.
        machines: Id -> machine that computed the row, in the order of `rows`; empty where it is not known.
        errors: Array -> reconstruction error that quantisation caused.
        after: How far the ledger had been read when `rows` was determined.
        replaced: Ids of committed rows that `blocks` gives other values. Where files are replaced in place, these rows
            are absent from the ledger until the new ones are read back; readers wait for that.

    Raises:
        WriteConflict: Another writer has committed clips of the shard since; nothing was committed here.
        DamagedStore: Reading back gives other bytes than were written.
        OSError: The disk is full.
    """
    storage, ledger = target.storage, ledger_journal(target.storage)
    slots = [row % target.spec.shard for row in rows.values()]
    sums: dict[str, dict[str, int]] = {name: {} for name in rows}
    with ExitStack() as locked:
        with storage.staging(shard) as folder:
            try:
                staged = target.file_format.stage(folder, target.spec, shard, slots, _with_checksums(blocks, sums))
                files = {name: size_and_crc_of_file(path) for name, path in staged.items()}
            except FileNotFoundError as error:
                if folder.exists() and not Path(error.filename or "").is_relative_to(folder):
                    raise
                # Another writer took this one for dead and is removing, or has removed, its files.
                raise write_conflict(f"shard {shard} of {storage.location}") from None
            locked.enter_context(storage.committing(shard))
            if storage.in_place:
                if replaced:
                    after = ledger.append(drop_record(shard, replaced, emptied=False, replaced=True), after)
                after = ledger.append(announce_record(shard, files), after)
            write_id = storage.publish(shard, staged, files)
        if storage.in_place:
            _read_back(target, shard, rows, sums)
        clips = {name: ClipRecord(row, sums[name], sources[name]) for name, row in rows.items()}
        commit = commit_record(
            shard,
            clips,
            files,
            target.fingerprint,
            errors,
            target.row_bytes,
            write_id,
            encode_origins(list(origins.values())),
            list(machines.values()),
        )
        ledger.append(commit, after)


def _with_checksums(blocks: Blocks, sums: Mapping[str, dict[str, int]]) -> Blocks:
    """`blocks` unchanged; the checksum of each row is added to `sums` while the row is in memory."""

    def rows_of(array: ArraySpec, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for row, checksums in zip(rows, sums.values(), strict=True):
            checksums[array.name] = crc32c(row)
            yield row

    for array, rows in blocks:
        yield array, rows_of(array, rows)


def _read_back(
    target: CommitTarget, shard: int, rows: Mapping[str, int], sums: Mapping[str, Mapping[str, int]]
) -> None:
    opened = target.file_format.open(target.storage.shard_files(shard, ""), target.spec, shard)
    for array in target.spec.arrays:
        buffer = np.empty(row_bytes(array), np.uint8)
        for name, row in rows.items():
            chunk = opened.find_row(array, row % target.spec.shard)
            if chunk.read_into(buffer) != sums[name][array.name]:
                raise DamagedStore(
                    f"{chunk.file.path}: {array.name} of clip {name!r} reads back differently from what was written; "
                    "nothing was committed: check the disk"
                )
