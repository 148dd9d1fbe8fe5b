"""A store in a folder: renames, locks and syncs make every change whole and lasting."""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from egopatch.features.io import file_lease as lease
from egopatch.features.io.fields import Record
from egopatch.features.io.files import (
    crc32c,
    file_sum_of,
    locked,
    make_folder,
    put_in_place,
    remove_folder,
    sync_file,
    write_file,
)
from egopatch.features.storage.journal import FileJournal
from egopatch.features.values.errors import DamagedStore

Entry = TypeVar("Entry")
_BLOCK = 1 << 18
_STAGING = "staging"


class LocalFile:
    """See `interface.OpenFile`; closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.handle).st_size

    def read(self, size: int, offset: int) -> bytes:
        """See `interface.OpenFile`."""
        return os.pread(self.handle, size, offset)

    def read_into(self, target: np.ndarray, offset: int) -> int:
        """See `interface.OpenFile`."""
        crc = done = 0
        while done < target.size:
            # A block at a time, so that the checksum finds it in the cache.
            block = target[done : done + _BLOCK]
            count = os.preadv(self.handle, [block.data], offset + done)
            if count == 0:
                raise DamagedStore(f"{self.path} ends {target.size - done} bytes too early")
            crc = crc32c(block[:count], crc)
            done += count
        return crc

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class LocalStorage:
    """See `interface.Storage`: a store in the folder `location`."""

    in_place = True
    parallel = 1

    def __init__(self, location: Path) -> None:
        self.location = location

    def inside(self, name: str) -> "LocalStorage":
        """See `interface.Storage`."""
        return LocalStorage(self.location / name)

    def prepare(self) -> None:
        """See `interface.Storage`."""
        make_folder(self.location)

    def open(self, name: str) -> LocalFile:
        """See `interface.Files`."""
        return LocalFile(self.location / name)

    def sum_of(self, name: str) -> tuple[int, int]:
        """See `interface.Files`."""
        return file_sum_of(self.location / name)

    def exists(self, name: str) -> bool:
        """See `interface.Files`."""
        return (self.location / name).exists()

    def read(self, name: str) -> bytes:
        """See `interface.Storage`."""
        return (self.location / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `interface.Storage`; the caller holds a lock that keeps others from writing it meanwhile."""
        write_file(self.location / name, content)

    def create(self, name: str, content: bytes) -> bool:
        """See `interface.Storage`; called while `growing`."""
        if self.exists(name):
            return False
        self.write(name, content)
        return True

    def journal(self, name: str, parse: Callable[[Record], Entry], by_shard: bool = False) -> FileJournal[Entry]:
        """See `interface.Storage`; one file, whatever its records are about."""
        return FileJournal(self.location / name, parse)

    @contextmanager
    def growing(self) -> Iterator[None]:
        """See `interface.Storage`."""
        with locked(self.location / "growth.lock"):
            yield

    def lease(self, shard: int) -> AbstractContextManager[None]:
        """See `interface.Storage`."""
        return lease.hold(self.location, shard)

    def require_unowned(self) -> None:
        """See `interface.Storage`."""
        lease.require_none(self.location)

    @contextmanager
    def staging(self, shard: int) -> Iterator[Path]:
        """See `interface.Storage`; on the same file system, so that files can be renamed into place."""
        folder = self.location / _STAGING / f"{shard:08d}-{uuid.uuid4().hex}"
        make_folder(folder)
        try:
            yield folder
        finally:
            remove_folder(folder)

    def publish(self, shard: int, staged: Mapping[str, Path], sums: Mapping[str, tuple[int, int]]) -> str:
        """See `interface.Storage`."""
        for path in staged.values():
            sync_file(path)
        for name, path in staged.items():
            put_in_place(path, self.location / name)
        return ""

    def shard_files(self, shard: int, attempt: str) -> "LocalStorage":
        """See `interface.Storage`."""
        return self

    def attempts(self, shard: int) -> set[str]:
        """See `interface.Storage`: the folders in which somebody has begun to write the shard."""
        return {folder.name for folder in (self.location / _STAGING).glob(f"{shard:08d}-*")}

    def all_attempts(self) -> dict[int, set[str]]:
        """See `interface.Storage`."""
        found: dict[int, set[str]] = {}
        for folder in (self.location / _STAGING).glob("*-*"):
            if (shard := folder.name.partition("-")[0]).isdecimal():
                found.setdefault(int(shard), set()).add(folder.name)
        return found

    def discard(self, shard: int, attempt: str, names: Sequence[str]) -> None:
        """See `interface.Storage`."""
        if attempt:
            remove_folder(self.location / _STAGING / attempt)
            return
        for name in names:
            (self.location / name).unlink(missing_ok=True)
