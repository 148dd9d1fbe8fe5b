"""Take what is damaged out of a store, so that `extract run` encodes exactly that again."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from features import lease
from features.durable import locked, write_file
from features.errors import DamagedStore
from features.halves import halves
from features.header import header_path, write_header
from features.ids import grow, growth_lock, ids_journal
from features.journal import Journal
from features.ledger import ledger_journal
from features.quarantine import quarantine_journal
from features.records import Record
from features.store import open_store
from features.verify import Report, bad_rows, check_shards, inspect, verify


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes:
        path: the store.
        before: what was wrong.
        dropped: clips (and texts of questions) that have to be encoded again.
        rewritten: files that describe the store and were made anew from what was intact.
    """

    path: Path
    before: Report
    dropped: tuple[str, ...]
    rewritten: tuple[str, ...]


def repair(path: Path | str) -> Repair:
    """Keep every clip that reads back bit for bit, and take the others out, so that they count as missing.

    Afterwards `verify` is clean. A damaged journal is kept beside the new one, as `*.damaged`.

    Raises:
        StoreError: there is no store, or no copy of its header is left.
        ShardOwned: somebody is writing to it.
    """
    root = Path(path)
    before = verify(root)
    dropped: list[str] = []
    rewritten: list[str] = []
    for half in halves(root):
        lease.require_none(root / half)
        with locked(growth_lock(root / half)):
            rewritten += [str(half / name) for name in _repair_description(root / half)]
        dropped += _repair_shards(root / half)
        _release(root / half, before.bad_clips)
    committed = open_store(root).clip_ids
    lost = [name for name in before.bad_clips if name not in dropped and name not in committed]
    return Repair(root, before, (*dropped, *lost), tuple(rewritten))


def _repair_description(root: Path) -> list[str]:
    found = inspect(root)
    damaged = {fault.where for fault in found.faults}
    if found.header is None:
        raise DamagedStore(
            f"{header_path(root)} and its copy in the arrays' metadata are damaged or disagree; put one of them "
            f"back, or move {root} away and encode again"
        )
    if header_path(root).name in damaged:
        write_header(root, found.header)
    for journal in (ledger_journal(root), quarantine_journal(root)):
        if journal.path.name in damaged:
            _rewrite(journal, [line.record for line in journal.read().lines])
    metadata = found.format.metadata(found.header, found.spec, len(found.row_ids))
    if ids_journal(root).path.name in damaged:
        _rewrite(ids_journal(root), [])
        grow(root, found.row_ids, metadata)
    elif damaged & metadata.keys():
        grow(root, [], metadata)
    return sorted(damaged)


def _release(root: Path, ids: Collection[str]) -> None:
    """Forget the earlier failures of clips that have to be encoded again, or `extract run` would pass them over."""
    journal = quarantine_journal(root)
    lines = journal.read().lines
    kept = [line.record for line in lines if line.entry.clip not in ids]
    if len(kept) < len(lines):
        journal.rewrite(kept)


def _rewrite(journal: Journal, records: Sequence[Record]) -> None:
    if journal.path.exists():
        write_file(journal.path.with_name(journal.path.name + ".damaged"), journal.path.read_bytes())
    journal.rewrite(records)


def _repair_shards(root: Path) -> list[str]:
    dropped: list[str] = []
    found = inspect(root)
    store = open_store(root)
    damaged = {fault.shard for _, faults in check_shards(found) for fault in faults if fault.shard is not None}
    for shard in sorted(damaged):
        bad = bad_rows(found, shard)
        store.rewrite_shard(shard, without=bad)
        dropped += bad
    return dropped
