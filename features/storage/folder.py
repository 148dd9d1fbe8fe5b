"""A store in a folder: renames, locks and syncs make every change atomic and durable."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from egopatch.features.io import file_lease
from egopatch.features.io.fields import FileSum, FileSums, Record
from egopatch.features.io.files import (
    REMEDIES,
    crc32c,
    identity_of,
    lock_file,
    locked,
    make_folder,
    opening,
    read_at,
    rename_into_place,
    size_and_crc_of_file,
    sync_file,
    write_file,
)
from egopatch.features.storage.journal import FileJournal
from egopatch.features.values.errors import DamagedStore, StoreError, write_conflict

Entry = TypeVar("Entry")
_BLOCK = 1 << 23  # bytes; each block gives up the GIL twice, which other threads may then keep for a while
_STAGING = "staging"


class LocalFile:
    """See `interface.OpenFile`; the file is closed with its last reference."""

    handle = -1  # until it is open

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDONLY)
        status = os.fstat(self.handle)
        self.size, self.identity = status.st_size, identity_of(status)

    def read(self, size: int, offset: int) -> bytes:
        with self._errors_explained():
            return read_at(self.handle, size, offset)

    def read_into(self, target: np.ndarray, offset: int) -> int:
        crc = done = 0
        with self._errors_explained():
            while done < target.size:
                block = target[done : done + _BLOCK]
                count = os.preadv(self.handle, [block.data], offset + done)
                if count == 0:
                    raise DamagedStore(f"{self.path} ends {target.size - done} bytes too early")
                crc = crc32c(block[:count], crc)
                done += count
        return crc

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = StoreError if error.errno in REMEDIES else DamagedStore
            remedy = REMEDIES.get(error.errno or 0, "check the disk, or the connection to its server")
            raise kind(
                f"{self.path} cannot be read ({error.strerror}); {remedy}, and run the same command again"
            ) from error

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class LocalStorage:
    """See `interface.Storage`: a store in the folder `location`."""

    in_place = True
    parallel_reads = 1

    def __init__(self, location: Path) -> None:
        self.location = location
        self.full_location = location.absolute()

    def prepare(self) -> None:
        make_folder(self.full_location)

    def open(self, name: str) -> LocalFile:
        with opening(self.full_location / name):
            return LocalFile(self.full_location / name)

    def size_and_crc(self, name: str) -> FileSum:
        with opening(self.full_location / name):
            return size_and_crc_of_file(self.full_location / name)

    def exists(self, name: str) -> bool:
        return (self.full_location / name).exists()

    def read(self, name: str) -> bytes:
        with opening(self.full_location / name):
            return (self.full_location / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `interface.Storage`; the caller holds a lock against other writers."""
        write_file(self.full_location / name, content)

    def create(self, name: str, content: bytes) -> None:
        """See `interface.Storage`; called within `adding_rows`."""
        if not self.exists(name):
            self.write(name, content)

    def journal(self, name: str, parse: Callable[[Record], Entry], by_shard: bool = False) -> FileJournal[Entry]:
        """See `interface.Storage`; always one file, with or without `by_shard`."""
        return FileJournal(self.full_location / name, parse)

    @contextmanager
    def adding_rows(self) -> Iterator[None]:
        with locked(self.full_location / "growth.lock"):
            yield

    def lease(self, shard: int) -> AbstractContextManager[None]:
        return file_lease.hold(self.full_location, shard)

    def require_no_writers(self) -> None:
        file_lease.require_no_writers(self.full_location)

    def unlock(self, shard: int | None = None) -> list[str]:
        return file_lease.remove(self.full_location, shard)

    @contextmanager
    def staging(self, shard: int) -> Iterator[Path]:
        """See `interface.Storage`; on the same file system, so that files can be renamed into place."""
        folder = self.full_location / _STAGING / f"{shard:08d}-{uuid.uuid4().hex}"
        make_folder(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def committing(self, shard: int) -> Iterator[None]:
        path = self._commit_lock(shard)
        make_folder(path.parent)
        with locked(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def wait_for_commit(self, shard: int) -> None:
        """See `interface.Storage`; needs no permission to write."""
        path = self._commit_lock(shard)
        with suppress(FileNotFoundError), path.open("rb") as file:
            lock_file(file.fileno(), fcntl.LOCK_SH, path)

    def _commit_lock(self, shard: int) -> Path:
        return self.full_location / "commits" / f"{shard:08d}.lock"

    def publish(self, shard: int, staged: Mapping[str, Path], sums: FileSums) -> str:
        try:
            with ThreadPoolExecutor(len(staged)) as threads:  # so that the disk combines the syncs into one wait
                list(threads.map(sync_file, staged.values()))
            for name, path in staged.items():
                rename_into_place(path, self.full_location / name)
        except FileNotFoundError:
            raise write_conflict(f"shard {shard} of {self.location}") from None
        return ""

    def shard_files(self, shard: int, write_id: str) -> "LocalStorage":
        return self

    def write_ids(self, shard: int) -> set[str]:
        """See `interface.Storage`: the staging folders of unfinished writes."""
        return {folder.name for folder in (self.full_location / _STAGING).glob(f"{shard:08d}-*")}

    def write_ids_by_shard(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for folder in (self.full_location / _STAGING).glob("*-*"):
            if (shard := folder.name.partition("-")[0]).isdecimal():
                found.setdefault(int(shard), set()).add(folder.name)
        return found

    def discard(self, shard: int, write_id: str, names: Sequence[str]) -> None:
        if write_id:
            shutil.rmtree(self.full_location / _STAGING / write_id, ignore_errors=True)
            return
        for name in names:
            (self.full_location / name).unlink(missing_ok=True)
