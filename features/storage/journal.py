"""An append-only file of JSON lines in which any damage is noticed.

Each line is `{"crc32c":"...","n":number,"record":{...}}`, written in exactly this way; the checksum is of the bytes of
number and record. A second file, the head, says how many lines have been written, so lines that vanish from the end
are noticed too. The head follows the line, so after a crash the journal may be one line ahead of its head, never behind
it. A line that is intact but says nothing that the journal's `parse` understands is a fault like a damaged one.
"""

import gc
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from egopatch.features.io.fields import MalformedRecord, Record, take_count
from egopatch.features.io.files import append_to, crc32c, locked, write_file
from egopatch.features.values.errors import DamagedStore
from egopatch.features.values.location import Location

Entry = TypeVar("Entry")
_LINE = re.compile(rb'{"crc32c":"(?P<crc32c>[0-9a-f]{8})","n":(?P<n>0|[1-9][0-9]{0,18}),"record":(?P<record>{.*})}\n')
_BUFFER = 1 << 17  # a line of the ledger is longer than the usual one


class Position:
    """How far a journal has been read; each kind of journal has its own."""


@dataclass(frozen=True)
class FilePosition(Position):
    """`number` lines, `end` bytes of the file `inode`."""

    inode: int = -1
    number: int = 0
    end: int = 0


@dataclass(frozen=True)
class Line(Generic[Entry]):
    """One intact line: its number from 0, and what `parse` made of its record."""

    number: int
    entry: Entry


@dataclass(frozen=True)
class Contents(Generic[Entry]):
    """What a journal holds after some position.

    Attributes:
        lines: the intact ones, in order.
        whole: whether the lines are all there are, and not only those that were added since an earlier reading.
        faults: one line a fault, naming the file and the line. A torn last line that the head does not count is no
            fault: a crash leaves it, and nobody was told that it had been written.
        lost: true when more than a torn last line is gone, so that the rest cannot be trusted to be the whole.
        position: where the next reading goes on.
    """

    lines: tuple[Line[Entry], ...]
    whole: bool
    faults: tuple[str, ...]
    lost: bool
    position: Position


def encode_line(number: int, record: Record) -> bytes:
    """One line of the file, newline included."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"))
    check = crc32c(f"{number}:{body}".encode())
    return f'{{"crc32c":"{check:08x}","n":{number},"record":{body}}}\n'.encode()


def decode_line(line: bytes) -> tuple[int, Record] | None:
    """Number and record of one line, or None where it is not exactly what was written."""
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


def checked_by(parse: Callable[[Record], object]) -> Callable[[Record], Record]:
    """A `parse` that refuses what another one refuses, and keeps the record as it is."""

    def keep(record: Record) -> Record:
        parse(record)
        return record

    return keep


def parse_lines(
    written: Iterable[bytes], first: int, name: str, parse: Callable[[Record], Entry]
) -> tuple[list[Line[Entry]], list[str], int]:
    """The intact lines, faults as in `Contents`, and the number that the next line has to have.

    Args:
        written: whole lines, without their ends.
        first: number of the first.
        name: of the journal, for the faults.
        parse: what a record says; raises MalformedRecord where it says nothing of the kind.
    """
    lines: list[Line[Entry]] = []
    faults: list[str] = []
    expected = first
    for place, line in enumerate(written, start=first + 1):
        decoded = decode_line(line + b"\n")
        if decoded is None:
            faults.append(f"{name} line {place} is damaged")
            expected += 1
            continue
        number, record = decoded
        if number != expected:
            faults.append(f"{name} line {place} has number {number} where {expected} is expected")
        if number < expected:
            continue
        expected = number + 1
        try:
            lines.append(Line(number, parse(record)))
        except MalformedRecord as error:
            faults.append(f"{name} line {place} is intact but no line of such a file: {error}")
    return lines, faults, expected


class FileJournal(Generic[Entry]):
    """See `interface.Journal`: a file at `path`, with its head beside it at `path` + `.head`.

    Args:
        path: the file.
        parse: what a record says; raises MalformedRecord where it says nothing of the kind.
    """

    def __init__(self, path: Path, parse: Callable[[Record], Entry]) -> None:
        self.path = path
        self.name = path.name
        self._parse = parse
        self.head_path = path.with_name(path.name + ".head")

    def create(self) -> None:
        """Make it, empty, where there is none."""
        with locked(self.path):
            if not self.head_path.exists():
                self._write_head(0, 0)

    def append(self, record: Record, after: Position | None = None) -> None:
        """Add one record and sync it. A torn line that a crash left at the end is cut off first.

        `after` is not needed: leases, and the lock while rows are added, keep others away.

        Raises:
            DamagedStore: what is there cannot be continued.
            OSError: the disk is full; the file is as it was.
        """
        with locked(self.path) as handle:
            number, end = self._extent(handle)
            os.ftruncate(handle, end)
            line = encode_line(number, record)
            append_to(handle, line)
            self._write_head(number + 1, end + len(line))

    def rewrite(self, records: Sequence[Record]) -> None:
        """Replace the whole journal, for repairs."""
        lines = [encode_line(number, record) for number, record in enumerate(records)]
        with locked(self.path):
            write_file(self.path, b"".join(lines))
            self._write_head(len(lines), sum(len(line) for line in lines))

    def keep_damaged(self) -> None:
        """See `interface.Journal`."""
        if self.path.exists():
            write_file(self.path.with_name(self.name + ".damaged"), self.path.read_bytes())

    def read(self, after: Position | None = None, shard: int | None = None) -> Contents[Entry]:
        """Everything that is intact, and everything that is not. Never raises for damage.

        Args:
            after: read only what was added since; a file that was replaced or cut short is read from the beginning.
            shard: is not needed: what was added since is one piece.
        """
        # The head first: a line that is added meanwhile then makes the journal longer than the head says, not shorter.
        head = self._read_head()
        try:
            with self.path.open("rb", _BUFFER) as file, collector_paused():
                start = _start(file, after)
                lines, faults, expected = parse_lines(_whole_lines(file), start.number, self.name, self._parse)
                end = file.tell()
                torn = file.read(1) != b""
        except FileNotFoundError:
            return Contents((), True, (f"{self.name} is missing",), True, FilePosition())
        lost = bool(faults)
        if head is None:
            faults.append(f"{self.head_path.name} is missing or damaged")
        elif expected < head[0]:
            faults.append(f"{self.name} ends after {expected} of {head[0]} lines")
            lost = lost or expected + torn < head[0]
        position = FilePosition(start.inode, expected, end)
        return Contents(tuple(lines), start.number == 0, tuple(faults), lost, position)

    def _extent(self, handle: int) -> tuple[int, int]:
        """Count of whole lines and where they end; only what the head does not count is read."""
        size = os.fstat(handle).st_size
        head = self._read_head()
        number, start = head if head and head[1] <= size else (0, 0)
        tail = os.pread(handle, size - start, start)
        return number + tail.count(b"\n"), start + tail.rfind(b"\n") + 1

    def _read_head(self) -> tuple[int, int] | None:
        """Lines and bytes that have been written for certain; None where the head is missing or damaged."""
        try:
            decoded = decode_line(self.head_path.read_bytes())
            return (take_count(decoded[1], "records"), take_count(decoded[1], "bytes")) if decoded else None
        except (FileNotFoundError, MalformedRecord):
            return None

    def _write_head(self, records: int, end: int) -> None:
        write_file(self.head_path, encode_line(0, {"records": records, "bytes": end}))


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection while many objects are made that all stay: it takes as long as making them."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _start(file: BinaryIO, after: Position | None) -> FilePosition:
    """Where to read from, and go there: `after`, or the beginning where this is another file than it was of."""
    status = os.fstat(file.fileno())
    if not isinstance(after, FilePosition) or after.inode != status.st_ino or after.end > status.st_size:
        after = FilePosition(status.st_ino)
    file.seek(after.end)
    return after


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that have an end, without it; the file stands behind the last of them when there are no more."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line[:-1]


def require_intact(contents: Contents, where: Location) -> None:
    """Refuse a journal, of the store at `where`, in which more than a torn last line is gone.

    Raises:
        DamagedStore: names the file, the line and what to do.
    """
    if contents.lost:
        raise DamagedStore(f"{where}: {'; '.join(contents.faults)}; run `python -m features repair {where}`")
