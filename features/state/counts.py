"""The number of clips in a store, what they were made of and by which machine, without opening the store."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from egopatch.features.io.fields import Record, get_count, get_field, get_list
from egopatch.features.state.header import HEADER, parse_header, read_header
from egopatch.features.state.ids import RowsAdded, ids_journal
from egopatch.features.state.ledger import LEDGER, Drop, Entry, Ledger, ledger_journal, parse_entry
from egopatch.features.state.quarantine import Quarantine
from egopatch.features.storage.journal import require_intact
from egopatch.features.storage.pick import storage_at
from egopatch.features.values.location import Location, parse_location


@dataclass(frozen=True)
class StoreCounts:
    """The counts that an open `Store` would give.

    Attributes:
        planned: Number of ids that have a row.
        committed: Number of clips that can be read.
        quarantined: Number of clips that could not be encoded.
        missing: Number of clips that are neither committed nor quarantined.
        bytes: Bytes in the committed shards' files.
        fingerprint: Digest of the store's fingerprint.
    """

    planned: int
    committed: int
    quarantined: int
    missing: int
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class _CommitCounts:
    """The few fields of a commit that are counted."""

    shard: int
    ids: list[str]
    nbytes: int


def count_clips(path: Location | str) -> StoreCounts:
    """Count the clips of the store at `path`. Errors as in `open_store`."""
    storage = storage_at(parse_location(path))
    header = parse_header(read_header(storage))
    ledger = storage.journal(LEDGER, _parse, by_shard=True).read()
    require_intact(ledger, storage.location)
    plan = ids_journal(storage).read()
    require_intact(plan, storage.location)
    clips: dict[int, Collection[str]] = {}
    nbytes: dict[int, int] = {}
    for line in ledger.lines:
        match line.entry:
            case _CommitCounts(shard, ids, size):
                clips[shard], nbytes[shard] = ids, size
            case Drop(shard=shard, ids=ids, emptied=emptied):
                clips[shard] = set(clips[shard]) - set(ids)
                if emptied:
                    del nbytes[shard]
    failed = Quarantine(storage).read(())
    encoded_later = sum(len(failed.keys() & ids) for ids in clips.values()) if failed else 0
    planned = sum(
        len(line.entry.ids) - line.entry.ids.count(None) for line in plan.lines if isinstance(line.entry, RowsAdded)
    )
    committed, quarantined = sum(map(len, clips.values())), len(failed) - encoded_later
    return StoreCounts(
        planned,
        committed,
        quarantined,
        planned - committed - quarantined,
        sum(nbytes.values()),
        header.fingerprint.digest,
    )


def machines_line(machines: Mapping[str, int]) -> str | None:
    """A line about a store whose clips unlike `machines` have computed; None where all are alike or unknown.

    Args:
        machines: Machine -> number of clips, as `Store.machines` gives it.
    """
    known = {name: clips for name, clips in machines.items() if name}
    if len(known) < 2:
        return None
    parts = "; ".join(f"{clips} by {name}" for name, clips in known.items())
    return f"note: unlike machines computed these clips, so their last bits may differ: {parts}"


def read_ledger(path: Location | str) -> Ledger:
    """The ledger of the store at `path`; an empty one where there is no store.

    Raises:
        DamagedStore: The ledger is damaged.
    """
    storage, ledger = storage_at(parse_location(path)), Ledger()
    if storage.exists(HEADER):
        contents = ledger_journal(storage).read()
        require_intact(contents, storage.location)
        ledger.add_all(contents)
    return ledger


def _parse(record: Record) -> _CommitCounts | Entry | None:
    kind = get_field(record, "kind", str)
    if kind == "announce":
        return None
    if kind != "commit":
        return parse_entry(record)
    nbytes = sum(get_count(file, "bytes") for file in get_field(record, "files", dict).values())
    return _CommitCounts(get_count(record, "shard"), get_list(record, "ids", str), nbytes)
