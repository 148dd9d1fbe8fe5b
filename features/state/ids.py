"""Assigns rows to clips. Ids are data: they stay inside a file and never become a path."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from egopatch.features.io.fields import (
    FileSums,
    MalformedRecord,
    Record,
    file_sums_to_json,
    get_field,
    get_file_sums,
    get_list,
)
from egopatch.features.io.files import size_and_crc
from egopatch.features.state.ledger import MAX_ROWS
from egopatch.features.storage.interface import Journal, Storage
from egopatch.features.storage.journal import Contents, Position
from egopatch.features.values.errors import StoreError

MAX_CLIP_ID = 1024
MAX_TEXT = 16_384


@dataclass(frozen=True)
class MetadataAnnounced:
    """Metadata files that a writer is about to put in place."""

    files: FileSums


@dataclass(frozen=True)
class RowsAdded:
    """Rows that exist from this line on: their ids, and the metadata files that include them."""

    ids: list[str | None]
    files: FileSums


Entry = MetadataAnnounced | RowsAdded


def ids_journal(storage: Storage) -> Journal[Entry]:
    """The ids of a store."""
    return storage.journal("ids.jsonl", _parse)


@dataclass(frozen=True)
class RowPlan:
    """The rows that the journal of ids results in.

    Attributes:
        row_ids: Row -> id. A row whose id was lost with a damaged file stays unused (None).
        files: Metadata files that describe arrays of that many rows to other tools.
        announced: Versions of those files that a writer was about to put in place.
    """

    row_ids: list[str | None] = field(default_factory=list)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    announced: list[FileSums] = field(default_factory=list)

    def add_all(self, contents: Contents[Entry]) -> None:
        """Apply lines that were read."""
        for line in contents.lines:
            match line.entry:
                case MetadataAnnounced(files):
                    self.announced.append(files)
                case RowsAdded(ids, files):
                    self.row_ids.extend(ids)
                    self.files.update(files)
                    self.announced.clear()


def add_rows(
    storage: Storage, ids: Sequence[str | None], metadata: Mapping[str, bytes], after: Position | None = None
) -> None:
    """Add rows for `ids`, within `storage.adding_rows()`.

    Args:
        ids: Ids of the new rows.
        metadata: Files that describe the arrays with the new rows; empty where other tools do not read the store.
        after: How far the caller has read the journal of ids.

    Raises:
        WriteConflict: Another process has added rows since.
    """
    journal = ids_journal(storage)
    files = file_sums_to_json({name: size_and_crc(content) for name, content in metadata.items()})
    if metadata:
        after = journal.append({"kind": "announce", "files": files}, after)
    for name, content in metadata.items():
        storage.write(name, content)
    journal.append({"kind": "grow", "ids": list(ids), "files": files}, after)


def _parse(record: Record) -> Entry:
    kind, files = get_field(record, "kind", str), get_file_sums(record)
    if kind == "announce":
        return MetadataAnnounced(files)
    if kind == "grow":
        return RowsAdded(get_list(record, "ids", str, type(None)), files)
    raise MalformedRecord(f"'kind' is {kind[:40]!r}; expected announce or grow")


def ids_without_row(known: Sequence[str | None], ids: Sequence[str], kind: str) -> list[str]:
    """The `ids` that have no row among the `known` ones, checked.

    Raises:
        StoreError: An id cannot be stored; the message names the id and the reason.
    """
    taken = set(known)
    new = [name for name in dict.fromkeys(ids) if name not in taken]
    for name in new:
        check_id(name, kind)
    if len(known) + len(new) > MAX_ROWS:
        raise StoreError(f"{len(known) + len(new)} rows are requested; expected at most {MAX_ROWS} in a store")
    if kind == "patches":
        _refuse_lookalikes([name for name in known if name is not None], new)
    return new


def check_id(name: str, kind: str) -> None:
    """Refuse an id that is unsafe or cannot be stored exactly. Texts of questions may contain any characters.

    Raises:
        StoreError: The id cannot be stored; the message names the id and the reason.
    """
    if not isinstance(name, str):
        raise StoreError(f"clip id {name!r} has type {type(name).__name__}; expected str")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise StoreError(f"id {name[:60]!r} is not valid Unicode; expected text that UTF-8 can hold") from None
    limit = MAX_CLIP_ID if kind == "patches" else MAX_TEXT
    if size > limit:
        raise StoreError(f"id {name[:60]!r}... has {size} bytes; expected at most {limit}")
    if kind != "patches":
        return
    if not name:
        raise StoreError("clip id '' is empty; expected a name")
    printable = name.isascii() and name.isprintable()  # true of nearly all ids, and many times faster to check
    if not printable and any(unicodedata.category(character) == "Cc" for character in name):
        raise StoreError(f"clip id {name[:60]!r} contains a control character; expected printable text")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0]:
        raise StoreError(
            f"clip id {name[:60]!r} is a path that leads elsewhere; expected a name without '..' or a leading '/'"
        )


def _refuse_lookalikes(known: list[str], new: list[str]) -> None:
    if all(map(str.isascii, known)) and all(map(str.isascii, new)):
        return  # ASCII names have one spelling only
    spellings = {unicodedata.normalize("NFC", name): name for name in known}
    for name in new:
        other = spellings.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise StoreError(
                f"clip ids {other!r} and {name!r} are two Unicode spellings of one name "
                f"({other!a} and {name!a}); use one of them for both"
            )
