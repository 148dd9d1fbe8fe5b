"""The protocols of a store's storage, which `folder` and `objects` each implement.

Names are paths inside the store, with slashes. A missing file raises FileNotFoundError everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from egopatch.features.io.fields import FileSum, FileSums, Record
from egopatch.features.storage.journal import Contents, Position
from egopatch.features.values.location import Location

Entry = TypeVar("Entry")


class OpenFile(Protocol):
    """A file open for reading at any offset, by several threads."""

    @property
    def path(self) -> Path | str:
        """Name of the file for messages; a Path if the file is on a disk."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    @property
    def identity(self) -> tuple[int, ...]:
        """As `features.io.files.identity_of` the file when it was opened; empty for an object."""

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset`.

        Raises:
            DamagedStore: The file does not exist any more.
        """

    def read_into(self, target: np.ndarray, offset: int) -> int:
        """Fill `target`, contiguous bytes, from `offset`; returns the CRC-32C of the bytes that were read.

        Raises:
            DamagedStore: The file is too short, or does not exist any more.
            StoreError: The system refuses to read the file, which itself may be intact.
        """


class ReadableFiles(Protocol):
    """Files that can be read by name."""

    def open(self, name: str) -> OpenFile:
        """Open a file for reading.

        Raises:
            OSError: The file is missing or damaged.
            StoreError: It cannot be opened for another reason, such as its permissions.
        """

    def size_and_crc(self, name: str) -> FileSum:
        """Size in bytes and CRC-32 of a file, by reading all of it. Errors as in `open`."""

    def exists(self, name: str) -> bool:
        """Whether a file of this name exists, or any file below a folder of this name."""


class Journal(Protocol[Entry]):
    """Records in the order in which they were appended; see `features.storage.journal`.

    Attributes:
        name: Name of the journal in the store.
    """

    name: str

    def create(self) -> None:
        """Create an empty journal where none exists."""

    def append(self, record: Record, after: Position | None = None) -> Position:
        """Append one record, which is safe from a crash once this returns.

        Args:
            record: JSON values; `shard` is the number of the shard that the record is about, if there is one.
            after: How far the caller has read. The record is refused if another one (about the same shard) has been
                appended since.

        Returns:
            The position after the record, for the next record that the caller appends about the same shard.

        Raises:
            WriteConflict: Another writer appended first; nothing was appended here.
            DamagedStore: The journal is too damaged to be continued.
        """

    def rewrite(self, change: Callable[[list[Entry]], Sequence[Record]]) -> None:
        """Replace the intact records by the result of `change`, for repairs; nothing is appended in between.

        Args:
            change: Called with the records of the whole journal, or with those of one shard after the other.
        """

    def back_up_damaged(self) -> None:
        """Copy the journal as it is to a name that ends in `.damaged`, for later inspection."""

    def read(self, after: Position | None = None, shard: int | None = None) -> Contents[Entry]:
        """Read everything that is intact, and list everything that is not. Damage never raises.

        Args:
            after: Read only what was appended since.
            shard: Only this shard matters to the caller; records about others may be omitted.
        """


class Storage(ReadableFiles, Protocol):
    """One store's files.

    Attributes:
        in_place: Whether a shard's files have the names that other tools look for, so that writing a shard again
            replaces them. Otherwise every write uses new names, and nothing is ever replaced.
        parallel_reads: Number of reads that are worth making at the same time.
    """

    in_place: bool
    parallel_reads: int

    @property
    def location(self) -> Location:
        """Folder or URL of the store, as it was given."""

    @property
    def full_location(self) -> Location:
        """`location`, with an absolute path: it stays valid if the process changes its working directory."""

    def prepare(self) -> None:
        """Create the folder, or check that objects can be written.

        Raises:
            StoreError: Nothing can be stored here; the message gives the reason in one line.
        """

    def read(self, name: str) -> bytes:
        """The whole content of a small file."""

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file: after a crash it holds the old bytes or the new ones, never a mixture."""

    def create(self, name: str, content: bytes) -> None:
        """Write a small file where none exists."""

    def journal(self, name: str, parse: Callable[[Record], Entry], by_shard: bool = False) -> Journal[Entry]:
        """The journal `name`; `by_shard` says that every record is about one shard."""

    def adding_rows(self) -> AbstractContextManager[None]:
        """Keep other processes from adding rows within the block, if `Journal.append` itself does not."""

    def lease(self, shard: int) -> AbstractContextManager[None]:
        """Own a shard while its rows are computed and written.

        Raises:
            ShardOwned: Another running process holds the lease; the message names host and process.
        """

    def require_no_writers(self) -> None:
        """Refuse to continue while another process writes to the store.

        Raises:
            ShardOwned: A shard is held; the message names its lease, host and process.
        """

    def unlock(self, shard: int | None = None) -> list[str]:
        """Remove the leases of one shard, or of all, that no running process keeps; returns one line for each.

        Raises:
            ShardOwned: A running process keeps one of them; none was removed.
        """

    def staging(self, shard: int) -> AbstractContextManager[Path]:
        """An empty local folder in which a shard's files are written; it is removed when the block ends."""

    def committing(self, shard: int) -> AbstractContextManager[None]:
        """Keep other processes from committing the shard within the block, where files are replaced in place.

        The lock belongs to the operating system: unlike a lease, it never outlives its process or depends on a clock.
        """

    def wait_for_commit(self, shard: int) -> None:
        """Wait until no process is committing the shard, where files are replaced in place."""

    def publish(self, shard: int, staged: Mapping[str, Path], sums: FileSums) -> str:
        """Put the staged files of a shard in place, by name.

        Returns:
            The id of this write, for `shard_files`; empty where files are replaced in place.

        Raises:
            DamagedStore: Reading back gives other bytes than were written.
            WriteConflict: Another writer removed the staged or published files, because it considered this one dead.
        """

    def shard_files(self, shard: int, write_id: str) -> ReadableFiles:
        """The files that `publish` put in place."""

    def write_ids(self, shard: int) -> set[str]:
        """Ids of all writes of a shard that left files, committed or not; files in place do not count."""

    def write_ids_by_shard(self) -> dict[int, set[str]]:
        """`write_ids` for every shard that has any."""

    def discard(self, shard: int, write_id: str, names: Sequence[str]) -> None:
        """Remove the files `names` of a write that is not, or no longer, committed."""


def file_matches(files: ReadableFiles, name: str, expected: FileSum) -> bool:
    """Whether a file exists and has the `expected` size and CRC-32."""
    try:
        return files.size_and_crc(name) == expected
    except OSError:
        return False
