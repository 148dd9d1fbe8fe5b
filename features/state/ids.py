"""Which row belongs to which clip. Ids are data: they are kept inside a file and never become a path."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from egopatch.features.io.fields import Files, MalformedRecord, Record, files_to_json, take, take_all, take_files
from egopatch.features.io.files import file_sum
from egopatch.features.state.ledger import MAX_ROWS
from egopatch.features.storage.interface import Journal, Storage
from egopatch.features.storage.journal import Contents, Position
from egopatch.features.values.errors import StoreError

MAX_CLIP_ID = 1024
MAX_TEXT = 16_384


@dataclass(frozen=True)
class Describe:
    """Metadata files that a writer is about to put in place."""

    files: Files


@dataclass(frozen=True)
class Grow:
    """Rows that exist from here on: their ids, and the metadata files that count them."""

    ids: list[str | None]
    files: Files


Entry = Describe | Grow


def ids_journal(storage: Storage) -> Journal[Entry]:
    """The ids of a store."""
    return storage.journal("ids.jsonl", _parse)


@dataclass(frozen=True)
class RowPlan:
    """What the file of ids says.

    Attributes:
        row_ids: row -> id. A row whose id was lost with a damaged file stays unused (None).
        files: the files that describe arrays of so many rows to other tools.
        announced: versions of those files that a writer was about to put in place.
    """

    row_ids: list[str | None] = field(default_factory=list)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    announced: list[Files] = field(default_factory=list)

    def add_all(self, contents: Contents[Entry]) -> None:
        """Take in lines that were read."""
        for line in contents.lines:
            match line.entry:
                case Describe(files):
                    self.announced.append(files)
                case Grow(ids, files):
                    self.row_ids.extend(ids)
                    self.files.update(files)
                    self.announced.clear()


def grow(
    storage: Storage, ids: Sequence[str | None], metadata: Mapping[str, bytes], after: Position | None = None
) -> None:
    """Add rows for `ids`, while `storage.growing()`.

    Args:
        storage: the store's.
        ids: of the new rows.
        metadata: the files that describe the arrays as they are then; none where other tools do not read the store.
        after: how far the caller has read the journal of ids.

    Raises:
        Overtaken: somebody else has added rows since.
    """
    journal = ids_journal(storage)
    files = files_to_json({name: file_sum(content) for name, content in metadata.items()})
    if metadata:
        journal.append({"kind": "announce", "files": files}, after)
    for name, content in metadata.items():
        storage.write(name, content)
    journal.append({"kind": "grow", "ids": list(ids), "files": files}, after)


def _parse(record: Record) -> Entry:
    kind, files = take(record, "kind", str), take_files(record, "files")
    if kind == "announce":
        return Describe(files)
    if kind == "grow":
        return Grow(take_all(record, "ids", str, type(None)), files)
    raise MalformedRecord(f"'kind' is {kind[:40]!r}; expected announce or grow")


def unseen(known: Sequence[str | None], ids: Sequence[str], kind: str) -> list[str]:
    """The `ids` that no row has yet, checked.

    Raises:
        StoreError: an id that cannot be one: the message says which and why.
    """
    have = set(known)
    fresh = [name for name in dict.fromkeys(ids) if name not in have]
    for name in fresh:
        check_id(name, kind)
    if len(known) + len(fresh) > MAX_ROWS:
        raise StoreError(f"{len(known) + len(fresh)} rows are asked for; expected at most {MAX_ROWS} in a store")
    if kind == "patches":
        _refuse_lookalikes([name for name in known if name is not None], fresh)
    return fresh


def check_id(name: str, kind: str) -> None:
    """Refuse an id that is unsafe or cannot be kept exactly. Texts of questions may hold any characters.

    Raises:
        StoreError: names the id and what is wrong with it.
    """
    if not isinstance(name, str):
        raise StoreError(f"clip id {name!r} is not a text; expected a str")
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
    plain = name.isascii() and name.isprintable()  # nearly all are, and this is many times faster
    if not plain and any(unicodedata.category(character) == "Cc" for character in name):
        raise StoreError(f"clip id {name[:60]!r} holds a control character; expected printable text")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0]:
        raise StoreError(
            f"clip id {name[:60]!r} is a path that leads elsewhere; expected a name without '..' or a leading '/'"
        )


def _refuse_lookalikes(known: list[str], fresh: list[str]) -> None:
    if all(map(str.isascii, known)) and all(map(str.isascii, fresh)):
        return  # each has one spelling
    spellings = {unicodedata.normalize("NFC", name): name for name in known}
    for name in fresh:
        other = spellings.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise StoreError(
                f"clip ids {other!r} and {name!r} are two Unicode spellings of one name "
                f"({other!a} and {name!a}); use one of them for both"
            )
