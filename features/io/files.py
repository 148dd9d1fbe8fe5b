"""File operations that survive a crash: once a function returns, its changes are on the disk.

Every change to a store goes through these few functions, so a crash can leave a store only in the states between
their calls.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from awscrt.checksums import crc32c as crc32c  # takes contiguous bytes and a sum to continue; so does `crc32`
from isal.isal_zlib import crc32 as crc32
from isal.isal_zlib import crc32_combine

from egopatch.features.common.disk import file_system_of
from egopatch.features.common.os_errors import NO_SPACE, NOT_ALLOWED
from egopatch.features.io.fields import FileSum
from egopatch.features.io.lfs import pointer_fault
from egopatch.features.values.errors import StoreError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# errno of an error that says nothing about the bytes of the file -> what to do about it.
REMEDIES = {
    **dict.fromkeys(NOT_ALLOWED, "give this user permission"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.ENOMEM: "free some memory",
    errno.ESTALE: "check the connection to its server",
}
_BLOCK = 1 << 20
_SMALL = 1 << 13
_BEHIND = 1 << 23  # bytes to append to a file before the disk is told to begin writing them


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """An OSError within the block, of work with an open file, names the file at `path` unless it names another."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Write the folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _errors_name(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Write the file's bytes to the disk and drop them from the page cache, so that reading back reads the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with _errors_name(path):
            os.fsync(handle)
        _leave_cache(handle)
    finally:
        os.close(handle)


def _leave_cache(handle: int, offset: int = 0, size: int = 0) -> None:
    """Drop bytes of an open file from the page cache; the disk begins to write those that it does not have yet.

    A size of 0 reaches to the end of the file. Systems without this advice keep the bytes in their cache.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, size, os.POSIX_FADV_DONTNEED)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents; their names are on the disk afterwards."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    sync_folder(folder.parent)


def rename_into_place(source: Path, target: Path) -> None:
    """Rename `source`, already synced, to `target` in one step; an OSError of that names `target`."""
    make_folder(target.parent)
    try:
        source.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    sync_folder(target.parent)


def write_file(path: Path, content: bytes) -> None:
    """Replace the whole of `path` by `content`: after a crash it holds the old bytes or the new ones, never a mixture.

    The caller holds a lock against other writers; the next call replaces a temporary file that a crash left.
    """
    with _renamed(path.with_name(f"{path.name}.tmp"), path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace the whole of `path` as `write_file` does, but by a file that the block writes, and without a lock.

    Yields:
        A path beside `path`, which no other process uses: of several writers the last one wins, with a complete file.
    """
    with _renamed(path.with_name(f".{path.name}.{uuid.uuid4().hex}"), path) as temporary:
        yield temporary


@contextmanager
def errors_of_temporary(temporary: Path, path: Path) -> Iterator[None]:
    """An OSError within the block about `temporary`, whose name would tell the user nothing, names `path`."""
    try:
        yield
    except OSError as error:
        # The error of an open file that cannot grow has no name.
        if error.filename == str(temporary) or (error.filename is None and error.errno in NO_SPACE):
            raise OSError(error.errno, error.strerror, str(path)) from error  # FFmpeg's errors cannot be renamed
        raise


@contextmanager
def _renamed(temporary: Path, path: Path) -> Iterator[Path]:
    make_folder(path.parent)
    try:
        with errors_of_temporary(temporary, path):
            yield temporary
            sync_file(temporary)
            rename_into_place(temporary, path)
    finally:
        # A read-only file system refuses this even if there is no such file, which would hide the first error.
        with suppress(OSError):
            temporary.unlink()


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size and time of the last change: another file, or another content, has another identity."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_at(handle: int, size: int, offset: int) -> bytes:
    """`size` bytes of an open file from `offset`, fewer where it ends before; one call to the system gives 2 GiB."""
    parts = []
    while part := os.pread(handle, size, offset):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)


def append_synced(handle: int, content: bytes) -> None:
    """Append to an open file and sync it; on failure the file is cut back to its former length."""
    before = os.fstat(handle).st_size
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(handle, left) :]  # the rest of what a disk has no space for ends in the error
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, before)
        raise


def is_file_of(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def lock_file(handle: int, how: int, path: Path) -> None:
    """Lock the open file at `path` as `fcntl.flock` does.

    Raises:
        StoreError: The file system has no locks; the message names file, file system and remedy.
    """
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StoreError(
            f"{path} cannot be locked ({error.strerror}): {file_system_of(path) or 'its file system'} has no file "
            "locks, so two processes could overwrite each other's files; mount it with locks (Lustre: option flock; "
            "NFS: version 4, or run lockd), or write to another file system"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the file's lock against every other process; yields a handle that is open for reading and appending.

    An OSError of work with the handle, within the block, gets the file's name.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with _errors_name(path):
                lock_file(handle, fcntl.LOCK_EX, path)
                try:
                    # While this process waited, a repair may have replaced the file.
                    if is_file_of(handle, path):
                        yield handle
                        return
                finally:
                    # Closing the handle alone would leave the lock to a child that was forked meanwhile.
                    fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """A block that opens `path` for reading; an OSError that leaves it means a missing or damaged file.

    Raises:
        StoreError: The system refuses to open the file, which itself may be intact; or Git LFS keeps it elsewhere.
    """
    try:
        if fault := pointer_fault(path):
            raise StoreError(f"{path} {fault}")
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise StoreError(
            f"{path} cannot be opened ({os.strerror(error.errno)}); {REMEDIES[error.errno]}, and run the same command "
            "again"
        ) from error


@contextmanager
def write_errors_explained(doing: str, kept: str = "earlier commits are intact") -> Iterator[None]:
    """Turn a full disk, or one that cannot be written, into a one-line StoreError that names the interrupted work.

    Args:
        doing: The work, such as `writing shard 3 of STORE`.
        kept: What a full disk has not harmed.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StoreError(
                f"no space left while {doing} ({error.strerror}); {kept}: free some space and run the same command "
                "again"
            ) from error
        if error.errno in NOT_ALLOWED:
            raise StoreError(
                f"{error.filename} cannot be written ({error.strerror}) while {doing}; mount the file system for "
                "writing, or give this user permission, and run the same command again"
            ) from error
        raise


def size_and_crc(content: bytes | memoryview) -> FileSum:
    """Size in bytes and CRC-32 of a file's future content; see `size_and_crc_of_file` for the choice of checksum."""
    return len(content), crc32(content)


class SummedFile:
    """A new file that is written from start to end, and whose checksum is known without reading it again.

    The disk writes its beginning while the rest is made, so that a sync at the end waits for little.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self, path: Path) -> None:
        # Rows are larger than any buffer, and the few small pieces between them are not worth a second copy of rows.
        self._file = path.open("wb", buffering=_SMALL)
        self.size = 0
        self._begun = 0
        self._crc32 = 0

    def __enter__(self) -> "SummedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: np.ndarray | bytes, crc: int | None = None) -> None:
        """Append contiguous bytes; `crc` is their CRC-32 where it is known."""
        data = np.frombuffer(content, np.uint8)
        self._file.write(data.data)
        self._crc32 = crc32_combine(self._crc32, crc32(data) if crc is None else crc, data.size)
        self.size += data.size
        if self.size - self._begun >= _BEHIND:
            self._file.flush()
            _leave_cache(self._file.fileno(), self._begun, self.size - self._begun)
            self._begun = self.size

    @property
    def sum(self) -> FileSum:
        """As `size_and_crc_of_file`."""
        return self.size, self._crc32


def size_and_crc_of_file(path: Path) -> FileSum:
    """Size in bytes and CRC-32 of a file, read in blocks.

    Rows have a CRC-32C of their own, so files need another polynomial: the CRC of bytes that are followed by their own
    CRC does not depend on the bytes, and a CRC-32C over a whole shard would miss two swapped rows.
    """
    block = np.empty(_BLOCK, np.uint8)
    view = block.data
    size = value = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            value = crc32(view[:count], value)
            size += count
    return size, value
