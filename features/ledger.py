"""The list of committed shards: the only thing that readers trust."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from features.errors import DamagedStore
from features.journal import Contents, Files, Journal, Record, files_from_json, files_to_json


@dataclass(frozen=True)
class ClipRecord:
    """One committed row.

    Attributes:
        row: in every array of the store.
        checksums: CRC-32C of the row's bytes, by array.
        source: hash of the video it came from.
        commit: number of the ledger line that last wrote its shard.
    """

    row: int
    checksums: Mapping[str, int]
    source: str
    commit: int


@dataclass(frozen=True)
class Ledger:
    """What the ledger's lines add up to.

    Attributes:
        clips: the committed ones, by id.
        files: shard -> its files as committed.
        announced: shard -> files that a writer was about to put in place; a crash may have left them there, holding
            the same committed rows.
        fingerprints: digests of what made the clips; one in a store that is well.
        errors: shard -> what storing in fewer bits cost, by array.
    """

    clips: dict[str, ClipRecord] = field(default_factory=dict)
    files: dict[int, Files] = field(default_factory=dict)
    announced: dict[int, list[Files]] = field(default_factory=dict)
    fingerprints: set[str] = field(default_factory=set)
    errors: dict[int, dict[str, float]] = field(default_factory=dict)

    def add_all(self, contents: Contents) -> None:
        """Take in lines that were read.

        Raises:
            DamagedStore: a line's checksum is right, but it is no ledger's line.
        """
        for number, record in enumerate(contents.records, start=contents.first):
            try:
                self.add(number, record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DamagedStore(f"ledger.jsonl line {number + 1} is no ledger's line ({error!r})") from error

    def add(self, number: int, record: Record) -> None:
        """Take in line `number`."""
        kind, shard = record["kind"], record["shard"]
        if kind == "announce":
            self.announced.setdefault(shard, []).append(files_from_json(record["files"]))
        elif kind == "commit":
            self.files[shard] = files_from_json(record["files"])
            self.announced.pop(shard, None)
            self.errors[shard] = record["errors"]
            self.fingerprints.add(record["fingerprint"])
            for clip in record["clips"]:
                checksums = {name: int(value, 16) for name, value in clip["crc32c"].items()}
                self.clips[clip["id"]] = ClipRecord(clip["row"], checksums, clip["source"], number)
        elif kind == "drop":
            for name in record["ids"]:
                self.clips.pop(name, None)
            if record["emptied"]:
                self.files.pop(shard, None)
                self.announced.pop(shard, None)


def read_ledger(journal: Journal) -> tuple[Ledger, Contents]:
    """Everything that the intact lines say, and what is wrong with the file."""
    contents = journal.read()
    ledger = Ledger()
    ledger.add_all(contents)
    return ledger, contents


def ledger_journal(root: Path) -> Journal:
    """The ledger's file in the store at `root`."""
    return Journal(root / "ledger.jsonl")


def announce(shard: int, files: Files) -> Record:
    """The line that precedes putting `files` in place."""
    return {"kind": "announce", "shard": shard, "files": files_to_json(files)}


def commit(
    shard: int,
    clips: Mapping[str, tuple[int, Mapping[str, int], str]],
    files: Files,
    fingerprint: str,
    errors: Mapping[str, float],
) -> Record:
    """The line that makes a shard's rows exist. `clips`: id -> (row, checksums, source)."""
    return {
        "kind": "commit",
        "shard": shard,
        "rows": [min(row for row, _, _ in clips.values()), max(row for row, _, _ in clips.values()) + 1],
        "clips": [
            {"id": name, "row": row, "crc32c": {array: f"{crc:08x}" for array, crc in sums.items()}, "source": source}
            for name, (row, sums, source) in clips.items()
        ],
        "files": files_to_json(files),
        "fingerprint": fingerprint,
        "errors": dict(errors),
    }


def drop(shard: int, ids: Sequence[str], emptied: bool) -> Record:
    """The line that takes damaged clips out again; `emptied` where the shard has no others."""
    return {"kind": "drop", "shard": shard, "ids": list(ids), "emptied": emptied}
