"""Clips that could not be encoded, each with the reason and the number of attempts."""

import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass

from egopatch.features.io.fields import Record, get_field
from egopatch.features.storage.interface import Journal, Storage
from egopatch.features.storage.journal import Position, require_intact, validating


@dataclass(frozen=True)
class Failure:
    """Why a clip could not be encoded: one line, and the traceback for debugging."""

    reason: str
    traceback: str = ""


@dataclass(frozen=True)
class QuarantineRecord:
    """A clip in quarantine: the latest reason and traceback, and the number of failed attempts."""

    reason: str
    attempts: int
    traceback: str = ""


Entry = tuple[str, Failure]  # a clip whose encoding failed once, and why


def quarantine_journal(storage: Storage) -> Journal[Entry]:
    """The quarantine of a store."""
    return storage.journal("quarantine.jsonl", _parse, by_shard=True)


def raw_quarantine_journal(storage: Storage) -> Journal[Record]:
    """The quarantine of a store, each line as it was written, for repairs."""
    return storage.journal("quarantine.jsonl", validating(_parse), by_shard=True)


def add_failures(journal: Journal[Entry], shard: int, failures: Mapping[str, Failure]) -> None:
    """Record a failed attempt for each clip of `shard` in `failures`."""
    for name, failure in failures.items():
        journal.append({"id": name, "shard": shard, "reason": failure.reason, "traceback": failure.traceback})


class Quarantine:
    """The clips in a store's quarantine; each call reads only what was appended since the last one, in any thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._position: Position | None = None
        self._failed: dict[str, QuarantineRecord] = {}

    def read(self, committed: Container[str]) -> dict[str, QuarantineRecord]:
        """The clips in quarantine, by id; a clip in `committed` was encoded later and has left it.

        Raises:
            DamagedStore: The journal is damaged.
        """
        with self._lock:
            contents = quarantine_journal(self._storage).read(self._position)
            require_intact(contents, self._storage.full_location)
            failed = {} if contents.from_start else self._failed
            for line in contents.lines:
                clip, failure = line.entry
                attempts = failed[clip].attempts + 1 if clip in failed else 1
                failed[clip] = QuarantineRecord(failure.reason, attempts, failure.traceback)
            self._failed, self._position = failed, contents.position
            return {clip: record for clip, record in failed.items() if clip not in committed}


def _parse(record: Record) -> Entry:
    clip = get_field(record, "id", str)
    return clip, Failure(get_field(record, "reason", str), get_field(record, "traceback", str))
