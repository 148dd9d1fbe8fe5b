"""The list of committed shards: the only thing that readers trust.

Three kinds of lines: `announce` precedes putting a shard's files in place, `commit` makes its rows exist, `drop` takes
damaged clips out again. Fields that a later version adds are ignored; a kind that it adds is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from features.journal import Contents
from features.records import (
    Files,
    MalformedRecord,
    Record,
    files_to_json,
    take,
    take_all,
    take_count,
    take_files,
)
from features.storage import Journal, Storage

MAX_ROWS = 10**8  # of a store; a ledger that claims more is not one of ours


@dataclass(frozen=True)
class ClipRecord:
    """One committed row.

    Attributes:
        row: in every array of the store.
        checksums: CRC-32C of the row's bytes before compression, in hexadecimal digits, by array.
        source: hash of the video it came from.
    """

    row: int
    checksums: Mapping[str, str]
    source: str


@dataclass(frozen=True)
class Announce:
    """Files that a writer is about to put in place."""

    shard: int
    files: Files


@dataclass(frozen=True)
class Commit:
    """Clips that exist from here on.

    Attributes:
        shard: its number.
        clips: by id.
        files: the shard's, as committed.
        fingerprint: digest of what made the clips.
        errors: what storing in fewer bits cost, by array.
        row_bytes: of one row of every array, before compression; None in a ledger of version 1, which had none.
        attempt: which writing of the shard, where every one has file names of its own; else empty.
    """

    shard: int
    clips: Mapping[str, ClipRecord]
    files: Files
    fingerprint: str
    errors: Mapping[str, float]
    row_bytes: int | None
    attempt: str = ""


@dataclass(frozen=True)
class Drop:
    """Damaged clips that are taken out; `emptied` where the shard has no others."""

    shard: int
    ids: tuple[str, ...]
    emptied: bool


Entry = Announce | Commit | Drop


@dataclass(frozen=True)
class Ledger:
    """What the ledger's lines add up to.

    Attributes:
        clips: the committed ones, by id.
        commits: shard -> number of the line that last committed it.
        files: shard -> its files as committed.
        attempts: shard -> the attempt that was committed, as in `Commit`.
        announced: shard -> files that a writer was about to put in place; a crash may have left them there, holding
            the same committed rows.
        fingerprints: digests of what made the clips; one in a store that is well.
        errors: shard -> what storing in fewer bits cost, by array.
    """

    clips: dict[str, ClipRecord] = field(default_factory=dict)
    commits: dict[int, int] = field(default_factory=dict)
    files: dict[int, Files] = field(default_factory=dict)
    attempts: dict[int, str] = field(default_factory=dict)
    announced: dict[int, list[Files]] = field(default_factory=dict)
    fingerprints: set[str] = field(default_factory=set)
    errors: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def add_all(self, contents: Contents[Entry]) -> None:
        """Take in lines that were read."""
        for line in contents.lines:
            self._add(line.number, line.entry)

    def _add(self, number: int, entry: Entry) -> None:
        shard = entry.shard
        match entry:
            case Announce():
                self.announced.setdefault(shard, []).append(entry.files)
            case Commit():
                self.announced.pop(shard, None)
                self.commits[shard] = number
                self.files[shard] = entry.files
                self.attempts[shard] = entry.attempt
                self.errors[shard] = entry.errors
                self.fingerprints.add(entry.fingerprint)
                self.clips.update(entry.clips)
            case Drop():
                for name in entry.ids:
                    self.clips.pop(name, None)
                if entry.emptied:
                    self.announced.pop(shard, None)
                    self.files.pop(shard, None)
                    self.attempts.pop(shard, None)


def ledger_journal(storage: Storage) -> Journal[Entry]:
    """The ledger of a store."""
    return storage.journal("ledger.jsonl", _parse, by_shard=True)


def announce(shard: int, files: Files) -> Record:
    """The line that precedes putting `files` in place."""
    return {"kind": "announce", "shard": shard, "files": files_to_json(files)}


def commit(
    shard: int,
    clips: Mapping[str, ClipRecord],
    files: Files,
    fingerprint: str,
    errors: Mapping[str, float],
    row_bytes: int,
    attempt: str = "",
) -> Record:
    """The line that makes a shard's rows exist; arguments as in `Commit`."""
    rows = [clip.row for clip in clips.values()]
    record = {
        "kind": "commit",
        "shard": shard,
        "rows": [min(rows), max(rows) + 1],
        "row_bytes": row_bytes,
        "clips": [
            {"id": name, "row": clip.row, "crc32c": dict(clip.checksums), "source": clip.source}
            for name, clip in clips.items()
        ],
        "files": files_to_json(files),
        "fingerprint": fingerprint,
        "errors": dict(errors),
    }
    return record | {"attempt": attempt} if attempt else record


def drop(shard: int, ids: Sequence[str], emptied: bool) -> Record:
    """The line that takes damaged clips out again; arguments as in `Drop`."""
    return {"kind": "drop", "shard": shard, "ids": list(ids), "emptied": emptied}


def _parse(record: Record) -> Entry:
    kind, shard = take(record, "kind", str), take_count(record, "shard")
    if kind == "announce":
        return Announce(shard, take_files(record, "files"))
    if kind == "drop":
        return Drop(shard, tuple(take_all(record, "ids", str)), take(record, "emptied", bool))
    if kind == "commit":
        return Commit(
            shard,
            dict(_parse_clip(clip) for clip in take_all(record, "clips", dict)),
            take_files(record, "files"),
            take(record, "fingerprint", str),
            _parse_errors(take(record, "errors", dict)),
            take_count(record, "row_bytes") if "row_bytes" in record else None,
            _parse_attempt(record),
        )
    raise MalformedRecord(f"'kind' is {kind[:40]!r}; expected announce, commit or drop")


def _parse_clip(clip: Record) -> tuple[str, ClipRecord]:
    row = take_count(clip, "row", MAX_ROWS)
    return take(clip, "id", str), ClipRecord(row, take(clip, "crc32c", dict), take(clip, "source", str))


def _parse_attempt(record: Record) -> str:
    attempt = take(record, "attempt", str) if "attempt" in record else ""
    if attempt.strip("0123456789abcdef"):  # it becomes a part of file names
        raise MalformedRecord(f"'attempt' is {attempt[:40]!r}; expected hexadecimal digits")
    return attempt


def _parse_errors(errors: Record) -> Mapping[str, float]:
    for array, error in errors.items():
        if type(error) not in (int, float):
            raise MalformedRecord(f"'errors' of {array!r} is {error!r}; expected a number")
    return errors
