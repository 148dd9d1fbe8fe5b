"""Clips that could not be encoded, each with its reason and attempts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from features.journal import Journal, require_intact


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


def quarantine_journal(root: Path) -> Journal:
    """The quarantine's file in the store at `root`."""
    return Journal(root / "quarantine.jsonl")


def add_failures(journal: Journal, failures: Mapping[str, Failure]) -> None:
    """Count one more attempt for each clip."""
    for name, failure in failures.items():
        journal.append({"id": name, "reason": failure.reason, "traceback": failure.traceback})


def read_quarantine(journal: Journal, committed: Iterable[str]) -> dict[str, QuarantineRecord]:
    """The clips in quarantine by id; those that were `committed` later are out of it.

    Raises:
        DamagedStore: the file is damaged.
    """
    contents = journal.read()
    require_intact(contents, journal.path)
    found: dict[str, QuarantineRecord] = {}
    for record in contents.records:
        before = found.get(record["id"])
        attempts = before.attempts + 1 if before else 1
        found[record["id"]] = QuarantineRecord(record["reason"], attempts, record["traceback"])
    for name in found.keys() & set(committed):
        del found[name]
    return found
