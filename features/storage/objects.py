"""A store in object storage. Objects are whole or absent and never replaced but for small ones, and those only if they
are still what was read; so any number of writers lose nothing, whoever believes to own what.

    store.json, ids.jsonl           as in a folder
    ledger/00000003.jsonl           the lines about shard 3, likewise quarantine/
    leases/00000003.json            who is at work on shard 3
    shards/00000003/ATTEMPT/        the files of shard 3 as one writer wrote them; the ledger says which attempt counts
"""

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from egopatch.features.io import object_lease
from egopatch.features.io.bucket import Bucket
from egopatch.features.io.fields import Record
from egopatch.features.io.files import crc32c
from egopatch.features.storage.object_journal import ObjectJournal
from egopatch.features.values.errors import DamagedStore, Overtaken
from egopatch.features.values.location import ObjectUrl

Entry = TypeVar("Entry")
_TAIL = 1 << 16  # holds the index of a shard, and small arrays whole


class ObjectFile:
    """See `interface.OpenFile`. Opening takes one request, which brings the file's end along."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.path = f"{bucket.url}/{key}"
        self._bucket = bucket
        self._key = key
        end = bucket.tail(key, _TAIL)
        self.size = end.size
        self._tail = end.content

    def read(self, size: int, offset: int) -> bytes:
        """See `interface.OpenFile`."""
        start = offset - (self.size - len(self._tail))
        if start >= 0:
            return self._tail[start : start + size]
        return self._bucket.range(self._key, offset, size)

    def read_into(self, target: np.ndarray, offset: int) -> int:
        """See `interface.OpenFile`."""
        content = self.read(target.size, offset)
        if len(content) < target.size:
            raise DamagedStore(f"{self.path} ends {target.size - len(content)} bytes too early")
        target[:] = np.frombuffer(content, np.uint8)
        return crc32c(target)


class ObjectFiles:
    """See `interface.Files`: the objects whose keys begin with `base`."""

    def __init__(self, bucket: Bucket, base: str) -> None:
        self._bucket = bucket
        self._base = base

    def open(self, name: str) -> ObjectFile:
        """See `interface.Files`."""
        return ObjectFile(self._bucket, self._base + name)

    def sum_of(self, name: str) -> tuple[int, int]:
        """See `interface.Files`."""
        return self._bucket.sum_of(self._base + name)

    def exists(self, name: str) -> bool:
        """See `interface.Files`."""
        return self._bucket.exists(self._base + name)


class ObjectStorage(ObjectFiles):
    """See `interface.Storage`: the store whose objects lie at `url`, or in the folder `base` below it.

    Raises:
        BadLocation: as `Bucket`.
    """

    in_place = False
    parallel = 16

    def __init__(self, url: ObjectUrl, bucket: Bucket | None = None, base: str = "") -> None:
        super().__init__(bucket or Bucket(url), base)
        self.location = url

    def inside(self, name: str) -> "ObjectStorage":
        """See `interface.Storage`."""
        return ObjectStorage(self.location / name, self._bucket, f"{self._base}{name}/") if name else self

    def prepare(self) -> None:
        """See `interface.Storage`."""
        self._bucket.exists(f"{self._base}store.json")

    def read(self, name: str) -> bytes:
        """See `interface.Storage`."""
        found = self._bucket.get(self._base + name)
        assert found is not None
        return found.content

    def write(self, name: str, content: bytes) -> None:
        """See `interface.Storage`."""
        self._bucket.put(self._base + name, content)

    def create(self, name: str, content: bytes) -> bool:
        """See `interface.Storage`."""
        try:
            self._bucket.put_over(self._base + name, content, None)
            return True
        except Overtaken:
            return False

    def journal(self, name: str, parse: Callable[[Record], Entry], by_shard: bool = False) -> ObjectJournal[Entry]:
        """See `interface.Storage`."""
        return ObjectJournal(self._bucket, self._base, name, parse, by_shard)

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Nothing to do: `ObjectJournal.append` stops the second of two."""
        yield

    def lease(self, shard: int) -> AbstractContextManager[None]:
        """See `interface.Storage`."""
        return object_lease.hold(self._bucket, self._base, shard)

    def require_unowned(self) -> None:
        """See `interface.Storage`."""
        object_lease.require_none(self._bucket, self._base)

    @contextmanager
    def staging(self, shard: int) -> Iterator[Path]:
        """See `interface.Storage`; it needs room for one shard where temporary files go (TMPDIR)."""
        with tempfile.TemporaryDirectory(prefix=f"shard-{shard:08d}-") as folder:
            yield Path(folder)

    def publish(self, shard: int, staged: Mapping[str, Path], sums: Mapping[str, tuple[int, int]]) -> str:
        """See `interface.Storage`: each file under a name that was never used, read back and compared."""
        attempt = uuid.uuid4().hex
        files = self.shard_files(shard, attempt)
        for name, path in staged.items():
            self._bucket.upload(f"{self._attempt(shard, attempt)}{name}", path)
        for name, expected in sums.items():
            if files.sum_of(name) != expected:
                raise DamagedStore(
                    f"{self.location}: {name} read back differs from what was written; nothing was committed"
                )
        return attempt

    def shard_files(self, shard: int, attempt: str) -> ObjectFiles:
        """See `interface.Storage`."""
        return ObjectFiles(self._bucket, self._attempt(shard, attempt))

    def attempts(self, shard: int) -> set[str]:
        """See `interface.Storage`."""
        return self._bucket.folders(f"{self._base}shards/{shard:08d}")

    def all_attempts(self) -> dict[int, set[str]]:
        """See `interface.Storage`; one list of all files, since asking shard by shard takes a request each."""
        found: dict[int, set[str]] = {}
        for key in self._bucket.listing(f"{self._base}shards"):
            shard, attempt, *_ = key.removeprefix(f"{self._base}shards/").split("/")
            if shard.isdecimal():
                found.setdefault(int(shard), set()).add(attempt)
        return found

    def discard(self, shard: int, attempt: str, names: Sequence[str]) -> None:
        """See `interface.Storage`."""
        self._bucket.delete([f"{self._attempt(shard, attempt)}{name}" for name in names])

    def _attempt(self, shard: int, attempt: str) -> str:
        return f"{self._base}shards/{shard:08d}/{attempt}/"
