"""How far a store has come: its counts, in half of the time that opening it takes."""

from collections.abc import Collection
from dataclasses import dataclass

from egopatch.features.io.fields import Record, take, take_all, take_count
from egopatch.features.state.header import parse_header, read_header
from egopatch.features.state.ids import Grow, ids_journal
from egopatch.features.state.ledger import LEDGER, Drop, Entry, parse_entry
from egopatch.features.state.quarantine import Quarantine
from egopatch.features.storage.journal import require_intact
from egopatch.features.storage.pick import storage_at
from egopatch.features.values.location import Location, locate


@dataclass(frozen=True)
class Progress:
    """What `Store` would count, had one opened it.

    Attributes:
        planned: ids that have a row.
        committed: clips that can be read.
        quarantined: clips that could not be encoded.
        missing: the rest.
        bytes: of the committed shards' files.
        fingerprint: digest of what makes the clips.
    """

    planned: int
    committed: int
    quarantined: int
    missing: int
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class _Counts:
    """What is counted of a commit: a fraction of it."""

    shard: int
    ids: list[str]
    nbytes: int


def progress(path: Location | str) -> Progress:
    """Count what the store at `path` holds. Errors as of `open_store`."""
    storage = storage_at(locate(path))
    described = parse_header(read_header(storage))
    ledger = storage.journal(LEDGER, _parse, by_shard=True).read()
    require_intact(ledger, storage.location)
    plan = ids_journal(storage).read()
    require_intact(plan, storage.location)
    clips: dict[int, Collection[str]] = {}
    nbytes: dict[int, int] = {}
    for line in ledger.lines:
        match line.entry:
            case _Counts(shard, ids, size):
                clips[shard], nbytes[shard] = ids, size
            case Drop(shard=shard, ids=ids, emptied=emptied):
                clips[shard] = set(clips[shard]) - set(ids)
                if emptied:
                    del nbytes[shard]
    failed = Quarantine(storage).without(())
    since = sum(len(failed.keys() & ids) for ids in clips.values()) if failed else 0
    planned = sum(
        len(line.entry.ids) - line.entry.ids.count(None) for line in plan.lines if isinstance(line.entry, Grow)
    )
    committed, quarantined = sum(map(len, clips.values())), len(failed) - since
    return Progress(
        planned,
        committed,
        quarantined,
        planned - committed - quarantined,
        sum(nbytes.values()),
        described.fingerprint.digest,
    )


def _parse(record: Record) -> _Counts | Entry | None:
    kind = take(record, "kind", str)
    if kind == "announce":
        return None
    if kind != "commit":
        return parse_entry(record)
    nbytes = sum(take_count(file, "bytes") for file in take(record, "files", dict).values())
    return _Counts(take_count(record, "shard"), take_all(record, "ids", str), nbytes)
