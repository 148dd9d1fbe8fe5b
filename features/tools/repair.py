"""Removing damaged clips from a store, so that `extract run` encodes exactly those again."""

from collections.abc import Collection
from dataclasses import dataclass

from egopatch.features.io.fields import Record
from egopatch.features.state.header import HEADER, write_header
from egopatch.features.state.ids import add_rows, ids_journal
from egopatch.features.state.ledger import raw_ledger_journal
from egopatch.features.state.quarantine import raw_quarantine_journal
from egopatch.features.storage.interface import Journal, Storage
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.store import open_store
from egopatch.features.store.text_substore import substores
from egopatch.features.tools.audit import audit_store
from egopatch.features.tools.verify import VerifyReport, bad_rows, check_shards, verify
from egopatch.features.values.errors import DamagedStore
from egopatch.features.values.location import Location


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did.

    Attributes:
        before: Result of `verify` before the repair.
        dropped: Clips (and texts of questions) that have to be encoded again.
        rewritten: Files that describe the store and were rewritten from intact data.
        missing: Number of clips (and texts) that the store is without, some perhaps since an interrupted repair.
    """

    before: VerifyReport
    dropped: tuple[str, ...]
    rewritten: tuple[str, ...]
    missing: int


def repair(path: Location | str, changed: Collection[str] = ()) -> RepairReport:
    """Keep every clip that reads back bit for bit, and remove the others, so that they count as missing.

    Afterwards `verify` finds nothing. A damaged journal is kept beside the new one, as `*.damaged`.

    Args:
        path: Location of the store.
        changed: Clips that are removed too, because their video has changed.

    Raises:
        StoreError: The store does not exist, or no copy of its header is left.
        ShardOwned: Another process is writing to the store.
    """
    root = storage_at(path)
    before = verify(root.location)
    dropped: list[str] = []
    rewritten: list[str] = []
    for folder in substores(root):
        storage = storage_at(root.location / folder)
        storage.require_no_writers()
        if not before.ok:  # an intact store may be read-only
            with storage.adding_rows():
                names = _repair_description(storage, before.bad_clips)
            rewritten += [f"{folder}/{name}" if folder else name for name in names]
        dropped += _repair_shards(storage, () if folder else changed)
    committed = open_store(root.location).clip_ids
    lost = [name for name in before.bad_clips if name not in dropped and name not in committed]
    missing = sum(len(open_store(root.location / folder).missing()) for folder in substores(root))
    return RepairReport(before, (*dropped, *lost), tuple(rewritten), missing)


def _repair_description(storage: Storage, bad: Collection[str]) -> list[str]:
    audit = audit_store(storage)
    damaged = {fault.where for fault in audit.faults}
    if audit.header_record is None:
        raise DamagedStore(
            f"{storage.location / HEADER} and its copy in the arrays' metadata are damaged or disagree; restore one of "
            f"them, or move {storage.location} away and encode again"
        )
    if HEADER in damaged:
        write_header(storage, audit.header_record)
    if raw_quarantine_journal(storage).name in damaged:
        _keep_intact_lines(raw_quarantine_journal(storage))
    _remove_from_quarantine(storage, bad)
    if raw_ledger_journal(storage).name in damaged:
        _keep_intact_lines(raw_ledger_journal(storage))
    metadata = {}
    if storage.in_place:
        metadata = audit.format.metadata_files(audit.header_record, audit.spec, len(audit.row_ids))
    if ids_journal(storage).name in damaged:
        ids_journal(storage).back_up_damaged()
        ids_journal(storage).rewrite(lambda _: [])
        add_rows(storage, audit.row_ids, metadata)
    elif damaged & metadata.keys():
        add_rows(storage, [], metadata)
    return sorted(damaged)


def _keep_intact_lines(journal: Journal[Record]) -> None:
    journal.back_up_damaged()
    journal.rewrite(lambda intact: intact)


def _remove_from_quarantine(storage: Storage, ids: Collection[str]) -> None:
    """Forget earlier failures of clips that have to be encoded again, which `extract run` would skip otherwise.

    This comes before the clips are removed: a repair that is interrupted after that finds nothing bad the next time.
    """
    journal = raw_quarantine_journal(storage)
    if any(line.entry["id"] in ids for line in journal.read().lines):
        journal.rewrite(lambda records: [record for record in records if record["id"] not in ids])


def _repair_shards(storage: Storage, changed: Collection[str]) -> list[str]:
    dropped: list[str] = []
    audit = audit_store(storage)
    store = open_store(storage.location)
    damaged = {fault.shard for _, faults in check_shards(audit) for fault in faults if fault.shard is not None}
    changed_in: dict[int, list[str]] = {}
    for record, name in zip(store.catalog.clip_records(list(changed)), changed, strict=True):
        changed_in.setdefault(store.catalog.shard_of(record.row), []).append(name)
    for shard in sorted(damaged | changed_in.keys()):
        bad = list(dict.fromkeys([*(bad_rows(audit, shard) if shard in damaged else ()), *changed_in.get(shard, ())]))
        _remove_from_quarantine(storage, bad)
        store.rewrite_shard(shard, without=bad)
        dropped += bad
    store.clear_leftovers()
    return dropped
