"""Counts a store's clips, and names the machines that computed them, without opening the store."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from egopatch.features.state.header import HEADER, parse_header, read_header
from egopatch.features.state.ids import RowsAdded, ids_journal
from egopatch.features.state.ledger import Ledger, ledger_journal
from egopatch.features.state.quarantine import Quarantine
from egopatch.features.storage.journal import require_intact
from egopatch.features.storage.pick import storage_at
from egopatch.features.values.location import Location


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


def count_clips(path: Location | str, ledger: Ledger, named: Container[str] | None = None) -> StoreCounts:
    """Count the clips of the store at `path`. Errors as in `open_store`.

    Args:
        path: The store.
        ledger: As `read_ledger(path)` returns it.
        named: Ids of the clips to count, where the annotations no longer name others; None counts all.
    """

    def count(ids: Iterable[str | None]) -> int:
        return sum(clip_id is not None and (named is None or clip_id in named) for clip_id in ids)

    storage = storage_at(path)
    header = parse_header(read_header(storage))
    plan = ids_journal(storage).read()
    require_intact(plan, storage.location)
    planned = sum(count(line.entry.ids) for line in plan.lines if isinstance(line.entry, RowsAdded))
    committed, quarantined = count(ledger.clips), count(Quarantine(storage).read(ledger.clips))
    missing, digest = planned - committed - quarantined, header.fingerprint.digest
    return StoreCounts(planned, committed, quarantined, missing, ledger.nbytes, digest)


def first_in_quarantine(
    path: Location | str, ledger: Ledger, named: Container[str] | None = None
) -> tuple[str, str] | None:
    """Id and reason of the first clip in quarantine; None if there is none. Arguments as for `count_clips`."""
    failed = Quarantine(storage_at(path)).read(ledger.clips)
    return next(((name, record.reason) for name, record in failed.items() if named is None or name in named), None)


def machines_line(machines: Mapping[str, int]) -> str | None:
    """A line about a store whose clips different `machines` computed; None if all are alike or unknown.

    Args:
        machines: Machine -> number of clips, as `Store.machines` gives it.
    """
    known = {name: clips for name, clips in machines.items() if name}
    if len(known) < 2:
        return None
    parts = "; ".join(f"{clips} by {name}" for name, clips in known.items())
    return f"note: machines of different kinds computed these clips, so their last bits may differ: {parts}"


def read_ledger(path: Location | str) -> Ledger:
    """The ledger of the store at `path`; an empty one where there is no store.

    Raises:
        DamagedStore: The ledger is damaged.
    """
    storage, ledger = storage_at(path), Ledger()
    if storage.exists(HEADER):
        contents = ledger_journal(storage).read()
        require_intact(contents, storage.location)
        ledger.add_all(contents)
    return ledger
