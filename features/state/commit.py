"""The commit protocol: write -> announce -> sync -> rename -> sync folder -> read back and compare -> record.

In object storage, where nothing is replaced: write -> upload under new names -> compare -> record. After a kill at any
point, the shard's earlier rows are intact, and the new ones are either all committed or not at all.

Every record is written on condition that nobody has recorded anything about the shard since its writer last read the
ledger, and in a folder only one process at a time goes from the first record to the last. So two processes that both
believe they hold a shard's lease lose nothing: the second is refused, reads the first one's commit, and commits both.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from egopatch.features.common.machine import usable_cores
from egopatch.features.formats.interface import ArrayRows, Format, SummedRow
from egopatch.features.state.ledger import (
    ClipRecord,
    Provenance,
    announce_record,
    commit_record,
    drop_record,
    ledger_journal,
)
from egopatch.features.state.origin import encode_origins
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.journal import Position
from egopatch.features.values.dtypes import row_bytes, spec_row_bytes
from egopatch.features.values.errors import DamagedStore, write_conflict
from egopatch.features.values.spec import ArraySpec, StoreSpec

# Threads that check, sum and read rows beside the one that writes; more would wait for the disk.
_THREADS = min(4, usable_cores())
_LARGE = 1 << 16  # bytes of a row from which handing it to a thread costs less than its checks


@dataclass(frozen=True)
class CommitTarget:
    """The store that a shard is committed to: storage, spec, file format, digest of its fingerprint."""

    storage: Storage
    spec: StoreSpec
    file_format: Format
    fingerprint: str


@dataclass(frozen=True)
class RowSource:
    """A row of one array to write.

    Attributes:
        content: Returns the row in the disk dtype; called in threads.
        known_finite: Whether it was found before to hold neither NaN nor infinity; any other row is checked.
    """

    content: Callable[[], np.ndarray]
    known_finite: bool


@dataclass(frozen=True)
class ShardCommit:
    """The new state of a shard, which will consist of exactly `rows`.

    Attributes:
        shard: Number of the shard.
        rows: Id -> row of the store, in rising order.
        sources: For each array of the spec its rows, in the order of `rows`.
        provenance: Id -> provenance of the row.
        errors: Array -> reconstruction error that quantisation caused.
        after: How far the ledger had been read when `rows` was determined.
        replaced: Ids of committed rows to which `sources` give new values. If files are replaced in place, these rows
            are absent from the ledger until the new ones are read back; readers wait for that.
    """

    shard: int
    rows: Mapping[str, int]
    sources: Sequence[tuple[ArraySpec, Sequence[RowSource]]]
    provenance: Mapping[str, Provenance]
    errors: Mapping[str, float]
    after: Position | None
    replaced: Sequence[str] = ()


class RowNotFinite(Exception):
    """A new row holds NaN or infinity; its arguments are the clip's id and the array's name."""


# Commits a shard whose lease the caller holds, as `commit_shard` does.
Committer = Callable[[CommitTarget, ShardCommit], None]


def commit_shard(target: CommitTarget, commit: ShardCommit) -> None:
    """Commit a shard. The caller holds its lease.

    Raises:
        RowNotFinite: A row holds NaN or infinity; nothing was written.
        WriteConflict: Another writer has committed clips of the shard since; nothing was committed here.
        DamagedStore: Reading back gives other bytes than were written.
        OSError: The disk is full.
    """
    shard, rows, after = commit.shard, commit.rows, commit.after
    storage, ledger = target.storage, ledger_journal(target.storage)
    slots = [row % target.spec.shard for row in rows.values()]
    sums: dict[str, dict[str, int]] = {name: {} for name in rows}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="rows") as threads, ExitStack() as locked:
        with storage.staging(shard) as folder:
            try:
                staged = target.file_format.stage(
                    folder, target.spec, shard, slots, _with_checksums(commit, sums, threads)
                )
                files = {name: file.sum for name, file in staged.items()}
            except FileNotFoundError as error:
                if folder.exists() and not Path(error.filename or "").is_relative_to(folder):
                    raise
                # Another writer considers this one dead and is removing, or has removed, its files.
                raise write_conflict(f"shard {shard} of {storage.location}") from None
            locked.enter_context(storage.committing(shard))
            if storage.in_place:
                if commit.replaced:
                    after = ledger.append(drop_record(shard, commit.replaced, emptied=False, replaced=True), after)
                after = ledger.append(announce_record(shard, files), after)
            write_id = storage.publish(shard, {name: file.path for name, file in staged.items()}, files)
        if storage.in_place:
            _read_back(target, shard, rows, sums, threads)
        made_of = commit.provenance
        record = commit_record(
            shard,
            clips={name: ClipRecord(row, sums[name], made_of[name].source) for name, row in rows.items()},
            files=files,
            fingerprint=target.fingerprint,
            errors=commit.errors,
            row_bytes=spec_row_bytes(target.spec),
            write_id=write_id,
            origins=encode_origins([made_of[name].origin for name in rows]),
            machines=[made_of[name].machine for name in rows],
        )
        ledger.append(record, after)


def _with_checksums(commit: ShardCommit, sums: Mapping[str, dict[str, int]], threads: ThreadPoolExecutor) -> ArrayRows:
    """The rows, checked and with checksums; their CRC-32C are also put into `sums`."""

    def summed(name: str, array: ArraySpec, source: RowSource) -> SummedRow:
        try:
            return SummedRow.of(source.content(), "" if source.known_finite else array.dtype)
        except FloatingPointError:
            raise RowNotFinite(name, array.name) from None

    def rows_of(array: ArraySpec, sources: Sequence[RowSource]) -> Iterator[SummedRow]:
        calls = [partial(summed, name, array, source) for name, source in zip(commit.rows, sources, strict=True)]
        rows = _ahead(calls, threads) if row_bytes(array) >= _LARGE else (call() for call in calls)
        for name, row in zip(commit.rows, rows, strict=True):
            sums[name][array.name] = row.crc32c
            yield row

    for array, sources in commit.sources:
        yield array, rows_of(array, sources)


def _ahead(rows: Sequence[Callable[[], SummedRow]], threads: ThreadPoolExecutor) -> Iterator[SummedRow]:
    """The results of calling `rows`, in order; `threads` call a few ahead of the one that is taken."""
    upcoming: deque[Future[SummedRow]] = deque()
    waiting = iter(rows)
    while True:
        upcoming += (threads.submit(row) for row in islice(waiting, 2 * _THREADS - len(upcoming)))
        if not upcoming:
            return
        yield upcoming.popleft().result()


def _read_back(
    target: CommitTarget,
    shard: int,
    rows: Mapping[str, int],
    sums: Mapping[str, Mapping[str, int]],
    threads: ThreadPoolExecutor,
) -> None:
    opened = target.file_format.open(target.storage.shard_files(shard, ""), target.spec, shard)

    def compare(array: ArraySpec, names: Sequence[str]) -> None:
        buffer = np.empty(row_bytes(array), np.uint8)
        for name in names:
            chunk = opened.find_row(array, rows[name] % target.spec.shard)
            if chunk.read_into(buffer) != sums[name][array.name]:
                raise DamagedStore(
                    f"{chunk.file.path}: {array.name} of clip {name!r} reads back differently from what was written; "
                    "nothing was committed: check the disk"
                )

    # Each thread gets consecutive rows, which the system reads ahead.
    names, count = list(rows), -(-len(rows) // _THREADS)
    parts = [(array, names[i : i + count]) for array in target.spec.arrays for i in range(0, len(names), count)]
    for compared in [threads.submit(compare, array, part) for array, part in parts]:
        compared.result()
