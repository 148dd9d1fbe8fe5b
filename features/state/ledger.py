"""The list of committed shards, which alone decides what readers see.

Lines have three kinds: `announce` precedes putting a shard's files in place, `commit` makes its rows exist, `drop`
removes damaged or stale clips. Unknown fields are ignored, since a later version may have added them; unknown kinds are
refused.
"""

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from egopatch.features.common.units import counted
from egopatch.features.io.fields import (
    FileSums,
    MalformedRecord,
    Record,
    file_sums_to_json,
    garbage_collection_paused,
    get_count,
    get_field,
    get_file_sums,
    get_list,
)
from egopatch.features.state.origin import Origin, decode_origins
from egopatch.features.storage.interface import Journal, ReadableFiles, Storage
from egopatch.features.storage.journal import Contents, validating

LEDGER = "ledger.jsonl"  # its name in the store
MAX_ROWS = 10**8  # in a store; a ledger with more is damaged


@dataclass(frozen=True)
class ClipRecord:
    """One committed row.

    Attributes:
        row: Row in every array of the store.
        checksums: CRC-32C of the row's bytes before compression, by array.
        source: Hash of the video (or text) that was encoded.
    """

    row: int
    checksums: Mapping[str, int]
    source: str


@dataclass(frozen=True)
class Provenance:
    """The source of a row, and the machine that computed it.

    Attributes:
        source: As in `ClipRecord`.
        origin: Stretch of video that was encoded; None where it is not known.
        machine: Machine that computed the row; empty where it is not known.
    """

    source: str
    origin: Origin | None = None
    machine: str = ""


@dataclass(frozen=True)
class RowVersion:
    """A committed row, and what it was made of: a row that replaces it differs in one of them."""

    record: ClipRecord
    origin: Origin | None


@dataclass(frozen=True)
class Announce:
    """Files that a writer is about to put in place."""

    shard: int
    files: FileSums


@dataclass(frozen=True)
class Commit:
    """Clips of one shard that exist from this line on, as columns: a reader may hold millions of clips in memory.

    Attributes:
        shard: Number of the shard.
        ids: Clip ids.
        rows: Rows of the clips in the store, rising.
        checksums: Checksums of the clips as in `ClipRecord`, by array, as four bytes a clip, high byte first.
        sources: Sources of the clips as in `ClipRecord`.
        files: Sizes and checksums of the shard's files.
        fingerprint: Digest of the fingerprint that the clips were encoded with.
        errors: Reconstruction error that quantisation caused, by array.
        row_bytes: Bytes in one row of every array together, before compression.
        write_id: Id of the write that these files come from, if every write has its own file names; else empty.
        origins: Origins of the clips, as `encode_origins` returns them.
        machines: The machine that computed each clip; empty if an earlier version stored them.
    """

    shard: int
    ids: tuple[str, ...]
    rows: tuple[int, ...]
    checksums: Mapping[str, bytes]
    sources: tuple[str, ...]
    files: FileSums
    fingerprint: str
    errors: Mapping[str, float]
    row_bytes: int
    write_id: str = ""
    origins: str = ""
    machines: tuple[str, ...] = ()

    @cached_property
    def _indexes(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    def clip(self, name: str) -> ClipRecord:
        """The record of the clip `name`, one of `ids`."""
        index = self._indexes[name]
        sums = {array: int.from_bytes(column[4 * index : 4 * index + 4]) for array, column in self.checksums.items()}
        return ClipRecord(self.rows[index], sums, self.sources[index])

    def origins_by_id(self) -> dict[str, Origin | None]:
        """Id -> origin of each clip; None for texts, and for clips that an earlier version stored."""
        return dict(zip(self.ids, decode_origins(self.origins, len(self.ids)), strict=True))

    def machine_of(self, name: str) -> str:
        """The machine that computed the clip `name`, one of `ids`; empty where it is not known."""
        return self.machines[self._indexes[name]] if self.machines else ""

    @property
    def nbytes(self) -> int:
        """Bytes in the shard's files."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class Drop:
    """Damaged or stale clips that are removed.

    Attributes:
        shard: Number of the shard.
        ids: The clips.
        emptied: Whether the shard has no other clips.
        replaced: Whether the process that removes them is about to commit their new rows.
    """

    shard: int
    ids: tuple[str, ...]
    emptied: bool
    replaced: bool = False


Entry = Announce | Commit | Drop


@dataclass(frozen=True)
class Ledger:
    """The current state that the ledger's lines result in.

    One thread may add lines while others read: what goes through all clips or commits copies the list of them first.

    Attributes:
        clips: Committed id -> the commit that contains it.
        commits: Shard -> the latest commit, if the shard has clips.
        announced: Shard -> files that a writer was about to put in place; after a crash they may be in place, with the
            same committed rows.
        replacing: Shards with removed rows whose replacements are not committed yet.
    """

    clips: dict[str, Commit] = field(default_factory=dict)
    commits: dict[int, Commit] = field(default_factory=dict)
    announced: dict[int, list[FileSums]] = field(default_factory=dict)
    replacing: set[int] = field(default_factory=set)

    def write_id(self, shard: int) -> str:
        """Id of the committed write of `shard`; empty where files are replaced in place, or nothing is committed."""
        return self.commits[shard].write_id if shard in self.commits else ""

    @property
    def nbytes(self) -> int:
        """Bytes in the committed shards' files."""
        return sum(commit.nbytes for commit in list(self.commits.values()))

    def files_in(self, storage: Storage, shard: int) -> ReadableFiles:
        """The files of a committed shard in `storage`, the store's."""
        return storage.shard_files(shard, self.write_id(shard))

    def origins(self, names: Collection[str] | None = None) -> dict[str, Origin | None]:
        """Id -> origin, as in `Commit.origins_by_id`, of the committed clips `names`; by default of all.

        Raises:
            DamagedStore: Another program wrote the ledger.
        """
        return _origins_in(dict(self.clips) if names is None else {name: self.clips[name] for name in names})

    def machines(self) -> dict[str, int]:
        """Machine -> number of the committed clips that it computed; the empty name stands for unknown machines."""
        count: Counter[str] = Counter()
        for commit in {id(commit): commit for commit in list(self.clips.values())}.values():
            machines = commit.machines or ("",) * len(commit.ids)
            count.update(m for name, m in zip(commit.ids, machines, strict=True) if self.clips.get(name) is commit)
        return dict(count)

    def worst_errors(self) -> dict[str, float]:
        """As `Store.reconstruction_error`."""
        worst: dict[str, float] = {}
        for commit in list(self.commits.values()):
            for array, error in commit.errors.items():
                worst[array] = max(error, worst.get(array, 0.0))
        return worst

    def provenance(self, names: Iterable[str]) -> dict[str, Provenance]:
        """Id -> provenance of its row, for the committed clips `names`. Errors as in `origins`."""
        commits = {name: self.clips[name] for name in names}
        return {
            name: Provenance(commits[name].clip(name).source, origin, commits[name].machine_of(name))
            for name, origin in _origins_in(commits).items()
        }

    def versions(self, names: Iterable[str]) -> dict[str, RowVersion]:
        """Id -> row, for each of `names` that is committed. Errors as in `origins`."""
        commits = {name: commit for name in names if (commit := self.clips.get(name)) is not None}
        return {name: RowVersion(commits[name].clip(name), origin) for name, origin in _origins_in(commits).items()}

    def add_all(self, contents: Contents[Entry]) -> None:
        """Apply lines that were read."""
        for line in contents.lines:
            self._add(line.entry)

    def _add(self, entry: Entry) -> None:
        shard = entry.shard
        match entry:
            case Announce():
                self.announced.setdefault(shard, []).append(entry.files)
            case Commit():
                self.announced.pop(shard, None)
                self.replacing.discard(shard)
                self.commits[shard] = entry
                self.clips.update(dict.fromkeys(entry.ids, entry))
            case Drop():
                for name in entry.ids:
                    self.clips.pop(name, None)
                if entry.replaced:
                    self.replacing.add(shard)
                if entry.emptied:
                    self.announced.pop(shard, None)
                    self.commits.pop(shard, None)


def _origins_in(commits: Mapping[str, Commit]) -> dict[str, Origin | None]:
    """Id -> origin of each clip, given the commit that contains it; errors as in `Ledger.origins`."""
    with garbage_collection_paused():
        by_commit = {number: commit.origins_by_id() for number, commit in {id(c): c for c in commits.values()}.items()}
        return {name: by_commit[id(commit)][name] for name, commit in commits.items()}


def ledger_journal(storage: Storage) -> Journal[Entry]:
    """The ledger of a store."""
    return storage.journal(LEDGER, parse_entry, by_shard=True)


def raw_ledger_journal(storage: Storage) -> Journal[Record]:
    """The ledger of a store, each line as it was written, for repairs."""
    return storage.journal(LEDGER, validating(parse_entry), by_shard=True)


def announce_record(shard: int, files: FileSums) -> Record:
    """The line that precedes putting `files` in place."""
    return {"kind": "announce", "shard": shard, "files": file_sums_to_json(files)}


def commit_record(
    shard: int,
    clips: Mapping[str, ClipRecord],
    files: FileSums,
    fingerprint: str,
    errors: Mapping[str, float],
    row_bytes: int,
    write_id: str = "",
    origins: str = "",
    machines: Sequence[str] = (),
) -> Record:
    """The line that commits `clips`, in the order of their rows; the other arguments are as in `Commit`."""
    records = list(clips.values())
    record = {
        "kind": "commit",
        "shard": shard,
        "ids": list(clips),
        "rows": [clip.row for clip in records],
        "row_bytes": row_bytes,
        "crc32c": {a: "".join(f"{clip.checksums[a]:08x}" for clip in records) for a in records[0].checksums},
        "sources": [clip.source for clip in records],
        "files": file_sums_to_json(files),
        "fingerprint": fingerprint,
        "errors": dict(errors),
    }
    record |= {"origins": origins} if origins else {}
    if any(machines):
        names = list(dict.fromkeys(machines))
        record["machines"] = {"names": names, "clips": [names.index(name) for name in machines]}
    return record | {"attempt": write_id} if write_id else record


def drop_record(shard: int, ids: Sequence[str], emptied: bool, replaced: bool = False) -> Record:
    """The line that removes damaged or stale clips; arguments are as in `Drop`."""
    record = {"kind": "drop", "shard": shard, "ids": list(ids), "emptied": emptied}
    return record | {"replaced": True} if replaced else record


def parse_entry(record: Record) -> Entry:
    """The entry that a line of the ledger holds.

    Raises:
        MalformedRecord: A field is missing, or has a value that no line of a ledger has.
    """
    kind, shard = get_field(record, "kind", str), get_count(record, "shard")
    if kind == "announce":
        return Announce(shard, get_file_sums(record))
    if kind == "drop":
        replaced = get_field(record, "replaced", bool) if "replaced" in record else False
        return Drop(shard, tuple(get_list(record, "ids", str)), get_field(record, "emptied", bool), replaced)
    if kind == "commit":
        ids = tuple(get_list(record, "ids", str))
        return Commit(
            shard=shard,
            ids=ids,
            rows=_parse_rows(record, len(ids)),
            checksums=_parse_checksums(get_field(record, "crc32c", dict), len(ids)),
            sources=_parse_sources(record, len(ids)),
            files=get_file_sums(record),
            fingerprint=get_field(record, "fingerprint", str),
            errors=_parse_errors(get_field(record, "errors", dict)),
            row_bytes=get_count(record, "row_bytes"),
            write_id=_parse_write_id(record),
            origins=get_field(record, "origins", str) if "origins" in record else "",
            machines=_parse_machines(get_field(record, "machines", dict), len(ids)) if "machines" in record else (),
        )
    raise MalformedRecord(f"'kind' is {kind[:40]!r}; expected announce, commit or drop")


def _parse_rows(record: Record, clips: int) -> tuple[int, ...]:
    rows = get_list(record, "rows", int)
    rising = rows == sorted(set(rows))
    if len(rows) != clips or not rows or not rising or rows[0] < 0 or rows[-1] >= MAX_ROWS:
        raise MalformedRecord(
            f"'rows' is {rows!r:.60}; expected {counted(clips, 'rising number')} from 0 to {MAX_ROWS - 1}"
        )
    return tuple(rows)


def _parse_checksums(columns: Record, clips: int) -> Mapping[str, bytes]:
    try:
        found = {array: bytes.fromhex(column) for array, column in columns.items()}
    except (TypeError, ValueError):
        found = {"": b""}
    if any(len(column) != 4 * clips for column in found.values()):
        raise MalformedRecord(
            f"'crc32c' is {columns!r:.60}; expected eight hexadecimal digits a clip, of {counted(clips, 'clip')}"
        )
    return found


def _parse_sources(record: Record, clips: int) -> tuple[str, ...]:
    sources = get_list(record, "sources", str)
    if len(sources) != clips:
        entries = counted(len(sources), "entry", "entries")
        raise MalformedRecord(f"'sources' has {entries}; expected {clips}, one for each clip")
    shared = {source: source for source in sources}  # one object for the many clips of one video
    return tuple(map(shared.__getitem__, sources))


def _parse_machines(machines: Record, clips: int) -> tuple[str, ...]:
    names, indexes = get_list(machines, "names", str), get_list(machines, "clips", int)
    if len(indexes) != clips or not set(indexes) <= set(range(len(names))):
        raise MalformedRecord(f"'machines' is {machines!r:.60}; expected the machine of {counted(clips, 'clip')}")
    names = [sys.intern(name) for name in names]  # the same few in every commit
    return tuple(names[index] for index in indexes)


def _parse_write_id(record: Record) -> str:
    write_id = get_field(record, "attempt", str) if "attempt" in record else ""
    if write_id.strip("0123456789abcdef"):  # it becomes a folder's name
        raise MalformedRecord(f"'attempt' is {write_id[:40]!r}; expected hexadecimal digits")
    return write_id


def _parse_errors(errors: Record) -> Mapping[str, float]:
    for array, error in errors.items():
        if type(error) not in (int, float):
            raise MalformedRecord(f"'errors' of {array!r} is {error!r}; expected a number")
    return errors
