"""A store in object storage. Objects are complete or absent, and large ones are never replaced.

A small object is replaced only if it is still as the writer last read it, so concurrent writers lose nothing, whatever
leases they believe they hold.

    store.json, ids.jsonl           as in a folder
    ledger/00000003.jsonl           lines about shard 3; quarantine/ likewise
    leases/00000003.json            the process that works on shard 3
    shards/00000003/WRITE_ID/       files of shard 3 from one write; the ledger names the write that counts
"""

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from egopatch.features.common.disk import free_bytes
from egopatch.features.common.os_errors import NO_SPACE
from egopatch.features.common.units import format_bytes
from egopatch.features.io import object_lease
from egopatch.features.io.bucket import Bucket
from egopatch.features.io.fields import FileSum, FileSums, Record
from egopatch.features.io.files import crc32c
from egopatch.features.storage.object_journal import ObjectJournal
from egopatch.features.values.errors import DamagedStore, StoreError, WriteConflict, write_conflict
from egopatch.features.values.location import ObjectUrl

Entry = TypeVar("Entry")
_TAIL = 1 << 16  # bytes that hold the index of a shard, and small arrays entirely


class ObjectFile:
    """See `interface.OpenFile`. Opening takes one request, which also fetches the end of the file."""

    identity = ()

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.path = f"{bucket.url}/{key}"
        self._bucket = bucket
        self._key = key
        end = bucket.tail(key, _TAIL)
        self.size = end.size
        self._tail = end.content

    def read(self, size: int, offset: int) -> bytes:
        start = offset - (self.size - len(self._tail))
        if start >= 0:
            return self._tail[start : start + size]
        try:
            return self._bucket.range(self._key, offset, size)
        except FileNotFoundError as error:  # a later commit has replaced the shard
            raise DamagedStore(f"{self.path} does not exist any more") from error

    def read_into(self, target: np.ndarray, offset: int) -> int:
        content = self.read(target.size, offset)
        if len(content) < target.size:
            raise DamagedStore(f"{self.path} ends {target.size - len(content)} bytes too early")
        target[:] = np.frombuffer(content, np.uint8)
        return crc32c(target)


class ObjectFiles:
    """See `interface.ReadableFiles`: the objects whose keys begin with `base`."""

    def __init__(self, bucket: Bucket, base: str) -> None:
        self._bucket = bucket
        self._base = base

    def open(self, name: str) -> ObjectFile:
        return ObjectFile(self._bucket, self._base + name)

    def size_and_crc(self, name: str) -> FileSum:
        return self._bucket.size_and_crc(self._base + name)

    def exists(self, name: str) -> bool:
        return self._bucket.exists(self._base + name)


class ObjectStorage(ObjectFiles):
    """See `interface.Storage`: the store whose objects are at `url`.

    Raises:
        BadLocation: As in `Bucket`.
    """

    in_place = False
    parallel_reads = 16

    def __init__(self, url: ObjectUrl) -> None:
        super().__init__(Bucket(url), "")
        self.location = self.full_location = url

    def prepare(self) -> None:
        self._bucket.exists("store.json")

    def read(self, name: str) -> bytes:
        return self._bucket.get(name).content

    def write(self, name: str, content: bytes) -> None:
        self._bucket.put(name, content)

    def create(self, name: str, content: bytes) -> None:
        with suppress(WriteConflict):
            self._bucket.put_if_unchanged(name, content, None)

    def journal(self, name: str, parse: Callable[[Record], Entry], by_shard: bool = False) -> ObjectJournal[Entry]:
        return ObjectJournal(self._bucket, name, parse, by_shard)

    def adding_rows(self) -> AbstractContextManager[None]:
        """Nothing to do: `ObjectJournal.append` refuses the second of two writers."""
        return nullcontext()

    def lease(self, shard: int) -> AbstractContextManager[None]:
        return object_lease.hold(self._bucket, shard)

    def require_no_writers(self) -> None:
        object_lease.require_no_writers(self._bucket)

    def unlock(self, shard: int | None = None) -> list[str]:
        return object_lease.remove(self._bucket, shard)

    @contextmanager
    def staging(self, shard: int) -> Iterator[Path]:
        """See `interface.Storage`; needs room for one shard in the folder for temporary files (TMPDIR)."""
        with tempfile.TemporaryDirectory(prefix=f"shard-{shard:08d}-") as folder:
            try:
                yield Path(folder)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                raise StoreError(
                    f"{folder}: {error.strerror}; a shard is written there before it is uploaded, and "
                    f"{format_bytes(free_bytes(Path(folder)))} are free: set TMPDIR to a folder with more room"
                ) from error

    def committing(self, shard: int) -> AbstractContextManager[None]:
        """See `interface.Storage`; the ledger's condition suffices, because no file is replaced."""
        return nullcontext()

    def wait_for_commit(self, shard: int) -> None:
        """See `interface.Storage`; no file is replaced."""

    def publish(self, shard: int, staged: Mapping[str, Path], sums: FileSums) -> str:
        """See `interface.Storage`: each file gets a name that was never used, and is read back and compared."""
        write_id = uuid.uuid4().hex
        files = self.shard_files(shard, write_id)
        for name, path in staged.items():
            self._bucket.upload(f"{_prefix(shard, write_id)}{name}", path)
        for name, expected in sums.items():
            try:
                found = files.size_and_crc(name)
            except FileNotFoundError:
                raise write_conflict(f"shard {shard} of {self.location}") from None
            if found != expected:
                raise DamagedStore(
                    f"{self.location}: {name} reads back differently from what was written; nothing was committed: run "
                    "the same command again"
                )
        return write_id

    def shard_files(self, shard: int, write_id: str) -> ObjectFiles:
        return ObjectFiles(self._bucket, _prefix(shard, write_id))

    def write_ids(self, shard: int) -> set[str]:
        return self._bucket.folders(f"shards/{shard:08d}")

    def write_ids_by_shard(self) -> dict[int, set[str]]:
        """See `interface.Storage`; lists all files at once, because listing each shard would take a request each."""
        found: dict[int, set[str]] = {}
        for key in self._bucket.listing("shards"):
            shard, write_id, *_ = key.removeprefix("shards/").split("/")
            if shard.isdecimal():
                found.setdefault(int(shard), set()).add(write_id)
        return found

    def discard(self, shard: int, write_id: str, names: Sequence[str]) -> None:
        self._bucket.delete([f"{_prefix(shard, write_id)}{name}" for name in names])


def _prefix(shard: int, write_id: str) -> str:
    return f"shards/{shard:08d}/{write_id}/"
