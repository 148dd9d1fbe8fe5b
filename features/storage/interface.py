"""What a store needs of the place where it lies: `local_storage` and `object_storage` each offer it.

Names are paths inside the store, with slashes. A missing file is a FileNotFoundError everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from egopatch.features.io.fields import Record
from egopatch.features.storage.journal import Contents, Position
from egopatch.features.values.location import Location

Entry = TypeVar("Entry")


class OpenFile(Protocol):
    """A file open for reading at any offset, by several threads."""

    @property
    def path(self) -> Path | str:
        """What to call it in a message; a Path if it is on a disk."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset`."""

    def read_into(self, target: np.ndarray, offset: int) -> int:
        """Fill `target`, contiguous bytes, from `offset`; returns the CRC-32C of what was read.

        Raises:
            DamagedStore: the file ends before.
        """


class Files(Protocol):
    """Files by name."""

    def open(self, name: str) -> OpenFile:
        """Open one for reading."""

    def sum_of(self, name: str) -> tuple[int, int]:
        """Size in bytes and CRC-32, by reading all of it."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file, or any below a folder of this name."""


class Journal(Protocol[Entry]):
    """Records in the order in which they were added; see `features.storage.journal`.

    Attributes:
        name: of it in the store.
    """

    name: str

    def create(self) -> None:
        """Make it, empty, where there is none."""

    def append(self, record: Record, after: Position | None = None) -> None:
        """Add one record; it is safe from a crash when this returns.

        Args:
            record: says under `shard` which shard it is about, if it is about one.
            after: what the caller has read. Where the storage has no locks, a record that somebody has added since
                (about the same shard) stops this one.

        Raises:
            Overtaken: somebody was faster; nothing was added.
            DamagedStore: what is there cannot be continued.
        """

    def rewrite(self, records: Sequence[Record]) -> None:
        """Replace all of it, for repairs."""

    def keep_damaged(self) -> None:
        """Copy it as it is to a name that ends in `.damaged`, for whoever looks closer."""

    def read(self, after: Position | None = None, shard: int | None = None) -> Contents[Entry]:
        """Everything that is intact, and everything that is not. Never raises for damage.

        Args:
            after: read only what was added since.
            shard: what was added about other shards may be left out.
        """


class Storage(Files, Protocol):
    """One store's files.

    Attributes:
        in_place: whether a shard's files have the names that other tools look for, so that writing a shard again
            replaces them; otherwise every writing has names of its own and nothing is ever replaced.
        parallel: reads that are worth making at the same time.
    """

    in_place: bool
    parallel: int

    @property
    def location(self) -> Location:
        """Where they lie."""

    def inside(self, name: str) -> "Storage":
        """The storage of a store that lies in this one's folder `name`."""

    def prepare(self) -> None:
        """Make the folder, or see that objects can be written.

        Raises:
            StoreError: in one line, why nothing can be stored there.
        """

    def read(self, name: str) -> bytes:
        """All of a small file."""

    def write(self, name: str, content: bytes) -> None:
        """Replace the whole of a small file: afterwards it holds the old bytes or the new ones, never a mixture."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file where there is none; false where there is one."""

    def journal(self, name: str, parse: Callable[[Record], Entry], by_shard: bool = False) -> Journal[Entry]:
        """The journal `name`; `by_shard` where every record is about one shard."""

    def growing(self) -> AbstractContextManager[None]:
        """Keep others from adding rows meanwhile, where `Journal.append` could not stop them."""

    def lease(self, shard: int) -> AbstractContextManager[None]:
        """Own a shard while its rows are computed and written.

        Raises:
            ShardOwned: another live process has it; the message names host and process.
        """

    def require_unowned(self) -> None:
        """Refuse to go on while anybody writes to the store.

        Raises:
            ShardOwned: names the shard's lease, host and process.
        """

    def staging(self, shard: int) -> AbstractContextManager[Path]:
        """An empty local folder to write the files of a shard into; afterwards it is gone."""

    def publish(self, shard: int, staged: Mapping[str, Path], sums: Mapping[str, tuple[int, int]]) -> str:
        """Put the staged files of a shard in place, by name.

        Returns:
            The attempt, which `shard_files` needs; empty where files are replaced in place.

        Raises:
            DamagedStore: the storage does not give back what it was given.
        """

    def shard_files(self, shard: int, attempt: str) -> Files:
        """The files that `publish` put in place."""

    def attempts(self, shard: int) -> set[str]:
        """The attempts at a shard of which something lies there, committed or not; not those in place."""

    def all_attempts(self) -> dict[int, set[str]]:
        """The same for every shard of which there are any."""

    def discard(self, shard: int, attempt: str, names: Sequence[str]) -> None:
        """Remove the files `names` of an attempt that is not committed, or not any more."""


def holds(files: Files, name: str, expected: tuple[int, int]) -> bool:
    """Whether a file is there with the `expected` size and CRC-32."""
    try:
        return files.sum_of(name) == expected
    except OSError:
        return False
