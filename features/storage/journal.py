"""An append-only file of JSON lines in which any damage is detected.

Each line is `{"crc32c":"...","n":number,"record":{...}}`, in exactly this form; the checksum covers the bytes of number
and record. A second file, the head, holds the number of lines written, so lines that vanish from the end are detected
too. The head is written after the line, so after a crash the journal may be one line ahead of its head, never behind
it. An intact line that the journal's `parse` does not understand is a fault like a damaged one.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar

from egopatch.features.common.units import counted
from egopatch.features.io.fields import MalformedRecord, Record, garbage_collection_paused, get_count
from egopatch.features.io.files import append_synced, crc32c, locked, opening, read_at, write_file
from egopatch.features.values.errors import DamagedStore, StoreError, write_conflict
from egopatch.features.values.location import Location

Entry = TypeVar("Entry")
_LINE = re.compile(rb'{"crc32c":"(?P<crc32c>[0-9a-f]{8})","n":(?P<n>0|[1-9][0-9]{0,18}),"record":(?P<record>{.*})}\n')
_BUFFER = 1 << 17  # lines of the ledger are longer than the default buffer


class Position:
    """How far a journal has been read; each kind of journal has its own subclass."""


@dataclass(frozen=True)
class FilePosition(Position):
    """The first `number` lines, up to byte `end`, of the file `inode`, after `rewrites` rewrites of the journal."""

    inode: int = -1
    number: int = 0
    end: int = 0
    rewrites: int = 0


class _Head(NamedTuple):
    """Lines and bytes that have certainly been written, and how often all lines were replaced.

    The inode does not reveal a replacement: after a repair has replaced the file, a later file may have the same inode.
    """

    lines: int
    end: int
    rewrites: int


@dataclass(frozen=True)
class Line(Generic[Entry]):
    """One intact line: its number, from 0, and its parsed record."""

    number: int
    entry: Entry


@dataclass(frozen=True)
class Contents(Generic[Entry]):
    """A journal's contents after some position.

    Attributes:
        lines: Intact lines, in order.
        from_start: Whether the lines are all of the journal, not only those appended since an earlier read.
        faults: One sentence for each fault, naming file and line. A torn last line that the head does not count is not
            a fault: a crash leaves such a line, and its writer never returned.
        lines_lost: Whether more than a torn last line is missing, so that the rest may be incomplete.
        position: Where the next read continues.
    """

    lines: tuple[Line[Entry], ...]
    from_start: bool
    faults: tuple[str, ...]
    lines_lost: bool
    position: Position


def encode_line(number: int, record: Record) -> bytes:
    """One line of the file, with its newline."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"))
    check = crc32c(f"{number}:{body}".encode())
    return f'{{"crc32c":"{check:08x}","n":{number},"record":{body}}}\n'.encode()


def decode_line(line: bytes) -> tuple[int, Record] | None:
    """Number and record of one line, or None where the line differs from what was written."""
    parts = _LINE.fullmatch(line)
    if parts is None:
        return None
    check, number, record = parts.groups()
    if f"{crc32c(record, crc32c(number + b':')):08x}".encode() != check:
        return None
    try:
        return int(number), json.loads(record)
    except (ValueError, RecursionError):
        return None


def validating(parse: Callable[[Record], object]) -> Callable[[Record], Record]:
    """A `parse` that refuses the same records as the given one, and returns the others unchanged."""

    def keep(record: Record) -> Record:
        parse(record)
        return record

    return keep


def parse_lines(
    written: Iterable[bytes], first: int, name: str, parse: Callable[[Record], Entry]
) -> tuple[list[Line[Entry]], list[str], int]:
    """The intact lines, faults as in `Contents`, and the expected number of the next line.

    Args:
        written: Complete lines, without their newlines.
        first: Number of the first line.
        name: Name of the journal, for the faults.
        parse: Turns a record into an entry; raises MalformedRecord for records that do not belong in the journal.
    """
    lines: list[Line[Entry]] = []
    faults: list[str] = []
    expected = first
    for position, line in enumerate(written, start=first + 1):
        decoded = decode_line(line + b"\n")
        if decoded is None:
            faults.append(f"{name} line {position} is damaged")
            expected += 1
            continue
        number, record = decoded
        if number != expected:
            faults.append(f"{name} line {position} has number {number}; expected {expected}")
        if number < expected:
            continue
        expected = number + 1
        try:
            lines.append(Line(number, parse(record)))
        except MalformedRecord as error:
            faults.append(f"{name} line {position} is intact but does not belong there: {error}")
    return lines, faults, expected


class FileJournal(Generic[Entry]):
    """See `interface.Journal`: a file at `path`, with its head beside it at `path` + `.head`.

    Args:
        path: The file.
        parse: As in `parse_lines`.
    """

    def __init__(self, path: Path, parse: Callable[[Record], Entry]) -> None:
        self.path = path
        self.name = path.name
        self._parse = parse
        self.head_path = path.with_name(path.name + ".head")

    def create(self) -> None:
        with locked(self.path):
            if not self.head_path.exists():
                self._write_head(_Head(0, 0, 0))

    def append(self, record: Record, after: Position | None = None) -> FilePosition:
        """Append one record and sync it. A torn line that a crash left at the end is cut off first.

        The lock is held from the comparison with `after` until the record is on the disk.

        Raises:
            WriteConflict: See `interface.Journal`; also if a repair has replaced the journal since.
            OSError: The disk is full; the file is unchanged.
        """
        with locked(self.path) as handle:
            number, end, rewrites = self._extent(handle)
            last = FilePosition(os.fstat(handle).st_ino, number, end, rewrites)
            if after is not None:
                self._refuse_newer_lines(handle, last, record.get("shard"), after)
            os.ftruncate(handle, end)
            line = encode_line(number, record)
            append_synced(handle, line)
            self._write_head(_Head(number + 1, end + len(line), rewrites))
            return replace(last, number=number + 1, end=end + len(line))

    def _refuse_newer_lines(self, handle: int, last: FilePosition, shard: object, after: Position) -> None:
        """Refuse to append if a line between `after` and `last` is about `shard`, or about none if that is None."""
        if not isinstance(after, FilePosition) or not _follows(last, after):
            raise write_conflict(self.path)
        for line in read_at(handle, last.end - after.end, after.end).splitlines(keepends=True):
            decoded = decode_line(line)
            if decoded is None or decoded[1].get("shard") == shard:
                raise write_conflict(self.path)

    def rewrite(self, change: Callable[[list[Entry]], Sequence[Record]]) -> None:
        with locked(self.path):
            records = change([line.entry for line in self.read().lines])
            lines = [encode_line(number, record) for number, record in enumerate(records)]
            head = self._read_head()
            write_file(self.path, b"".join(lines))
            self._write_head(_Head(len(lines), sum(map(len, lines)), 1 + (head.rewrites if head else 0)))

    def back_up_damaged(self) -> None:
        if self.path.exists():
            write_file(self.path.with_name(self.name + ".damaged"), self.path.read_bytes())

    def read(self, after: Position | None = None, shard: int | None = None) -> Contents[Entry]:
        """See `interface.Journal`.

        Args:
            after: Read only what was appended since; a file that was replaced or cut short is read from the beginning.
            shard: Ignored, because all shards share the file.
        """
        # The head is read first: a line appended in between then makes the journal longer than the head, not shorter.
        head = self._read_head()
        try:
            with opening(self.path), self.path.open("rb", _BUFFER) as file, garbage_collection_paused():
                start = _start(file, after, head.rewrites if head else 0)
                lines, faults, expected = parse_lines(_whole_lines(file), start.number, self.name, self._parse)
                end = file.tell()
                torn = file.read(1) != b""
        except FileNotFoundError:
            return Contents((), True, (f"{self.name} is missing",), True, FilePosition())
        lost = bool(faults)
        if head is None:
            faults.append(f"{self.head_path.name} is missing or damaged")
        elif expected < head.lines:
            faults.append(f"{self.name} ends after {expected} of {counted(head.lines, 'line')}")
            lost = lost or expected + torn < head.lines
        position = replace(start, number=expected, end=end)
        return Contents(tuple(lines), start.number == 0, tuple(faults), lost, position)

    def _extent(self, handle: int) -> _Head:
        """The correct head, which counts all complete lines; reads only the bytes that the head on disk lacks."""
        size = os.fstat(handle).st_size
        head = self._read_head() or _Head(0, 0, 0)
        number, start = (head.lines, head.end) if head.end <= size else (0, 0)
        tail = read_at(handle, size - start, start)
        return _Head(number + tail.count(b"\n"), start + tail.rfind(b"\n") + 1, head.rewrites)

    def _read_head(self) -> _Head | None:
        """The head; None where it is missing or damaged."""
        try:
            with opening(self.head_path):
                decoded = decode_line(self.head_path.read_bytes())
            if decoded is None:
                return None
            record = {"rewrites": 0} | decoded[1]
            return _Head(get_count(record, "records"), get_count(record, "bytes"), get_count(record, "rewrites"))
        except (FileNotFoundError, MalformedRecord):
            return None

    def _write_head(self, head: _Head) -> None:
        rewrites = {"rewrites": head.rewrites} if head.rewrites else {}
        write_file(self.head_path, encode_line(0, {"records": head.lines, "bytes": head.end} | rewrites))


def _start(file: BinaryIO, after: Position | None, rewrites: int) -> FilePosition:
    """Seek to `after`, or to the beginning if `after` is about another file; returns the position."""
    status = os.fstat(file.fileno())
    whole = FilePosition(status.st_ino, end=status.st_size, rewrites=rewrites)
    if not isinstance(after, FilePosition) or not _follows(whole, after):
        after = replace(whole, end=0)
    file.seek(after.end)
    return after


def _follows(position: FilePosition, after: FilePosition) -> bool:
    """Whether `position` is in the file that was read up to `after`, and not before it."""
    return (after.inode, after.rewrites) == (position.inode, position.rewrites) and after.end <= position.end


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Complete lines without their newlines; afterwards the file's position is behind the last one."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line[:-1]


def require_intact(contents: Contents, where: Location) -> None:
    """Refuse a journal of the store at `where` that lacks more than a torn last line.

    Raises:
        DamagedStore: Lines are lost; the message names the file, the line and what to do.
        StoreError: The whole store is gone, so that nothing can be repaired.
    """
    if contents.lines_lost:
        # A writer may have made the folder again for its lease or its files, but neither of these two.
        if isinstance(where, Path) and not any((where / name).exists() for name in ("store.json", "ids.jsonl")):
            raise StoreError(
                f"store {where.absolute()} does not exist any more; if it was moved, open the store at its new place; "
                "if its disk was unmounted, mount it again"
            )
        remedy = f"run `egopatch features repair {shlex.quote(str(where))}`"
        raise DamagedStore(f"{where}: {'; '.join(contents.faults)}; {remedy}")
