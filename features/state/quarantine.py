"""Clips that could not be encoded, each with its reason and attempts."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from egopatch.features.io.fields import Record, take
from egopatch.features.storage.interface import Journal, Storage
from egopatch.features.storage.journal import Position, checked_by, require_intact


@dataclass(frozen=True)
class Failure:
    """Why a clip could not be encoded: one line, and the traceback for whoever looks closer."""

    reason: str
    traceback: str = ""


@dataclass(frozen=True)
class QuarantineRecord:
    """A clip's standing in quarantine: the latest reason and traceback, and how often it was tried."""

    reason: str
    attempts: int
    traceback: str = ""


@dataclass(frozen=True)
class Attempt:
    """One line of the file: a clip that failed once more."""

    clip: str
    failure: Failure


def quarantine_journal(storage: Storage) -> Journal[Attempt]:
    """The quarantine of a store."""
    return storage.journal("quarantine.jsonl", _parse, by_shard=True)


def quarantine_records(storage: Storage) -> Journal[Record]:
    """The quarantine of a store, each line as it was written, for repairs."""
    return storage.journal("quarantine.jsonl", checked_by(_parse), by_shard=True)


def add_failures(journal: Journal[Attempt], shard: int, failures: Mapping[str, Failure]) -> None:
    """Count one more attempt for each clip of `shard`."""
    for name, failure in failures.items():
        journal.append({"id": name, "shard": shard, "reason": failure.reason, "traceback": failure.traceback})


class Quarantine:
    """Who is in quarantine by the file of a store, read once and then followed."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._position: Position | None = None
        self._found: dict[str, QuarantineRecord] = {}

    def without(self, committed: Container[str]) -> dict[str, QuarantineRecord]:
        """The clips in quarantine by id; those that were `committed` later are out of it.

        Raises:
            DamagedStore: the file is damaged.
        """
        contents = quarantine_journal(self._storage).read(self._position)
        require_intact(contents, self._storage.location)
        found = {} if contents.whole else self._found
        for line in contents.lines:
            clip, failure = line.entry.clip, line.entry.failure
            attempts = found[clip].attempts + 1 if clip in found else 1
            found[clip] = QuarantineRecord(failure.reason, attempts, failure.traceback)
        self._found, self._position = found, contents.position
        return {clip: record for clip, record in found.items() if clip not in committed}


def _parse(record: Record) -> Attempt:
    return Attempt(take(record, "id", str), Failure(take(record, "reason", str), take(record, "traceback", str)))
