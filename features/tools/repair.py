"""Take what is damaged out of a store, so that `extract run` encodes exactly that again."""

from collections.abc import Collection
from dataclasses import dataclass

from egopatch.features.io.fields import Record
from egopatch.features.state.header import HEADER, write_header
from egopatch.features.state.ids import grow, ids_journal
from egopatch.features.state.ledger import ledger_records
from egopatch.features.state.quarantine import quarantine_records
from egopatch.features.storage.interface import Journal, Storage
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.store import open_store
from egopatch.features.store.text_substore import halves
from egopatch.features.tools.verify import Report, bad_rows, check_shards, inspect, verify
from egopatch.features.values.errors import DamagedStore
from egopatch.features.values.location import Location, locate


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes:
        path: the store.
        before: what was wrong.
        dropped: clips (and texts of questions) that have to be encoded again.
        rewritten: files that describe the store and were made anew from what was intact.
    """

    path: Location
    before: Report
    dropped: tuple[str, ...]
    rewritten: tuple[str, ...]


def repair(path: Location | str) -> Repair:
    """Keep every clip that reads back bit for bit, and take the others out, so that they count as missing.

    Afterwards `verify` is clean. A damaged journal is kept beside the new one, as `*.damaged`.

    Raises:
        StoreError: there is no store, or no copy of its header is left.
        ShardOwned: somebody is writing to it.
    """
    root = storage_at(locate(path))
    before = verify(root.location)
    dropped: list[str] = []
    rewritten: list[str] = []
    for half in halves(root):
        storage = root.inside(half)
        storage.require_unowned()
        with storage.growing():
            rewritten += [f"{half}/{name}" if half else name for name in _repair_description(storage)]
        dropped += _repair_shards(storage)
        _release(storage, before.bad_clips)
    committed = open_store(root.location).clip_ids
    lost = [name for name in before.bad_clips if name not in dropped and name not in committed]
    return Repair(root.location, before, (*dropped, *lost), tuple(rewritten))


def _repair_description(storage: Storage) -> list[str]:
    found = inspect(storage)
    damaged = {fault.where for fault in found.faults}
    if found.header is None:
        raise DamagedStore(
            f"{storage.location / HEADER} and its copy in the arrays' metadata are damaged or disagree; put one of "
            f"them back, or move {storage.location} away and encode again"
        )
    if HEADER in damaged:
        write_header(storage, found.header)
    for journal in (ledger_records(storage), quarantine_records(storage)):
        if journal.name in damaged:
            _rewrite(journal, [line.entry for line in journal.read().lines])
    metadata = found.format.metadata(found.header, found.spec, len(found.row_ids)) if storage.in_place else {}
    if ids_journal(storage).name in damaged:
        _rewrite(ids_journal(storage), [])
        grow(storage, found.row_ids, metadata)
    elif damaged & metadata.keys():
        grow(storage, [], metadata)
    return sorted(damaged)


def _release(storage: Storage, ids: Collection[str]) -> None:
    """Forget the earlier failures of clips that have to be encoded again, or `extract run` would pass them over."""
    journal = quarantine_records(storage)
    records = [line.entry for line in journal.read().lines]
    kept = [record for record in records if record["id"] not in ids]
    if len(kept) < len(records):
        journal.rewrite(kept)


def _rewrite(journal: Journal, records: list[Record]) -> None:
    journal.keep_damaged()
    journal.rewrite(records)


def _repair_shards(storage: Storage) -> list[str]:
    dropped: list[str] = []
    found = inspect(storage)
    store = open_store(storage.location)
    damaged = {fault.shard for _, faults in check_shards(found) for fault in faults if fault.shard is not None}
    for shard in sorted(damaged):
        bad = bad_rows(found, shard)
        store.rewrite_shard(shard, without=bad)
        dropped += bad
    store.clear_leftovers()
    return dropped
