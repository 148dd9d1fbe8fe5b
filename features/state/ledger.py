"""The list of committed shards: the only thing that readers trust.

Three kinds of lines: `announce` precedes putting a shard's files in place, `commit` makes its rows exist, `drop` takes
damaged clips out again. Fields that a later version adds are ignored; a kind that it adds is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from egopatch.features.io.fields import (
    Files,
    MalformedRecord,
    Record,
    files_to_json,
    take,
    take_all,
    take_count,
    take_files,
)
from egopatch.features.storage.interface import Journal, Storage
from egopatch.features.storage.journal import Contents, checked_by

LEDGER = "ledger.jsonl"  # its name in the store
MAX_ROWS = 10**8  # of a store; a ledger that claims more is not one of ours


@dataclass(frozen=True)
class ClipRecord:
    """One committed row.

    Attributes:
        row: in every array of the store.
        checksums: CRC-32C of the row's bytes before compression, by array.
        source: hash of the video it came from.
    """

    row: int
    checksums: Mapping[str, int]
    source: str


@dataclass(frozen=True)
class Announce:
    """Files that a writer is about to put in place."""

    shard: int
    files: Files


@dataclass(frozen=True)
class Commit:
    """Clips that exist from here on, in columns: a store may have millions, and every reader holds them all.

    Attributes:
        shard: its number.
        ids: of the clips.
        rows: of the clips in the store, rising.
        checksums: by array, four bytes for each clip, the high one first: as in `ClipRecord`.
        sources: of the clips, as in `ClipRecord`.
        files: the shard's, as committed.
        fingerprint: digest of what made the clips.
        errors: what storing in fewer bits cost, by array.
        row_bytes: of one row of every array, before compression.
        attempt: which writing of the shard, where every one has file names of its own; else empty.
    """

    shard: int
    ids: tuple[str, ...]
    rows: tuple[int, ...]
    checksums: Mapping[str, bytes]
    sources: tuple[str, ...]
    files: Files
    fingerprint: str
    errors: Mapping[str, float]
    row_bytes: int
    attempt: str = ""

    def clip(self, name: str) -> ClipRecord:
        """What it says of the clip `name`, one of `ids`."""
        place = self.ids.index(name)
        sums = {array: int.from_bytes(column[4 * place : 4 * place + 4]) for array, column in self.checksums.items()}
        return ClipRecord(self.rows[place], sums, self.sources[place])


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
        clips: id -> the commit that it stands in, for each committed clip.
        commits: shard -> number of the line that last committed it.
        files: shard -> its files as committed.
        attempts: shard -> the attempt that was committed, as in `Commit`.
        announced: shard -> files that a writer was about to put in place; a crash may have left them there, holding
            the same committed rows.
        fingerprints: digests of what made the clips; one in a store that is well.
        errors: shard -> what storing in fewer bits cost, by array.
    """

    clips: dict[str, Commit] = field(default_factory=dict)
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
                self.clips.update(dict.fromkeys(entry.ids, entry))
            case Drop():
                for name in entry.ids:
                    self.clips.pop(name, None)
                if entry.emptied:
                    self.announced.pop(shard, None)
                    self.files.pop(shard, None)
                    self.attempts.pop(shard, None)


def ledger_journal(storage: Storage) -> Journal[Entry]:
    """The ledger of a store."""
    return storage.journal(LEDGER, parse_entry, by_shard=True)


def ledger_records(storage: Storage) -> Journal[Record]:
    """The ledger of a store, each line as it was written, for repairs."""
    return storage.journal(LEDGER, checked_by(parse_entry), by_shard=True)


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
    """The line that makes `clips`, in the order of their rows, exist; the other arguments as in `Commit`."""
    records = list(clips.values())
    record = {
        "kind": "commit",
        "shard": shard,
        "ids": list(clips),
        "rows": [clip.row for clip in records],
        "row_bytes": row_bytes,
        "crc32c": {a: "".join(f"{clip.checksums[a]:08x}" for clip in records) for a in records[0].checksums},
        "sources": [clip.source for clip in records],
        "files": files_to_json(files),
        "fingerprint": fingerprint,
        "errors": dict(errors),
    }
    return record | {"attempt": attempt} if attempt else record


def drop(shard: int, ids: Sequence[str], emptied: bool) -> Record:
    """The line that takes damaged clips out again; arguments as in `Drop`."""
    return {"kind": "drop", "shard": shard, "ids": list(ids), "emptied": emptied}


def parse_entry(record: Record) -> Entry:
    """What a line says.

    Raises:
        MalformedRecord: nothing that a ledger's line says.
    """
    kind, shard = take(record, "kind", str), take_count(record, "shard")
    if kind == "announce":
        return Announce(shard, take_files(record, "files"))
    if kind == "drop":
        return Drop(shard, tuple(take_all(record, "ids", str)), take(record, "emptied", bool))
    if kind == "commit":
        ids = tuple(take_all(record, "ids", str))
        return Commit(
            shard,
            ids,
            _parse_rows(record, len(ids)),
            _parse_checksums(take(record, "crc32c", dict), len(ids)),
            _parse_sources(record, len(ids)),
            take_files(record, "files"),
            take(record, "fingerprint", str),
            _parse_errors(take(record, "errors", dict)),
            take_count(record, "row_bytes"),
            _parse_attempt(record),
        )
    raise MalformedRecord(f"'kind' is {kind[:40]!r}; expected announce, commit or drop")


def _parse_rows(record: Record, clips: int) -> tuple[int, ...]:
    rows = take_all(record, "rows", int)
    rising = rows == sorted(set(rows))
    if len(rows) != clips or not rows or not rising or rows[0] < 0 or rows[-1] >= MAX_ROWS:
        raise MalformedRecord(f"'rows' is {rows!r:.60}; expected {clips} rising numbers from 0 to {MAX_ROWS - 1}")
    return tuple(rows)


def _parse_checksums(columns: Record, clips: int) -> Mapping[str, bytes]:
    try:
        found = {array: bytes.fromhex(column) for array, column in columns.items()}
    except (TypeError, ValueError):
        found = {"": b""}
    if any(len(column) != 4 * clips for column in found.values()):
        raise MalformedRecord(
            f"'crc32c' is {columns!r:.60}; expected eight hexadecimal digits for each of {clips} clips"
        )
    return found


def _parse_sources(record: Record, clips: int) -> tuple[str, ...]:
    sources = take_all(record, "sources", str)
    if len(sources) != clips:
        raise MalformedRecord(f"'sources' has {len(sources)} entries; expected one for each of {clips} clips")
    once = {source: source for source in sources}  # many clips come from one video
    return tuple(map(once.__getitem__, sources))


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
