"""Rows off the disk into memory, each checked against the ledger."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from features.dtypes import bytes_of, row_bytes
from features.errors import DamagedStore
from features.formats import Format, OpenShard
from features.ledger import ClipRecord
from features.spec import ArraySpec, StoreSpec

_OPEN_SHARDS = 64


class RowReader:
    """Reads rows of the store at `root`; safe to share between threads, not between processes."""

    def __init__(self, root: Path, spec: StoreSpec, files: Format) -> None:
        self._root = root
        self._spec = spec
        self._files = files
        self._open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self,
        names: Sequence[str],
        records: Sequence[ClipRecord],
        into: Sequence[tuple[ArraySpec, Tensor]],
        threads: int,
    ) -> None:
        """Fill each array's tensor [len(names), *row], contiguous and on the CPU, with the rows of `names`.

        Raises:
            DamagedStore: names the clip, the array and the file whose bytes are not those that were committed.
        """
        rows = [(array, bytes_of(out).reshape(len(names), row_bytes(array))) for array, out in into]

        def read_clip(place: int) -> None:
            for array, targets in rows:
                self._read_row(names[place], records[place], array, targets[place])

        if threads == 1 or len(names) == 1:
            for place in range(len(names)):
                read_clip(place)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(read_clip, range(len(names))):
                pass

    def close(self) -> None:
        """Forget the open files; those that nobody reads any more are closed."""
        with self._lock:
            self._open.clear()

    def _read_row(self, name: str, record: ClipRecord, array: ArraySpec, target: np.ndarray) -> None:
        shard, slot = divmod(record.row, self._spec.shard)
        advice = f"run `python -m features verify {self._root}` and then `repair`"
        try:
            file, offset = self._shard(shard, record.commit).find(array, slot)
            intact = file.read_into(target, offset) == record.checksums.get(array.name)
        except DamagedStore as error:
            raise DamagedStore(f"clip {name!r} cannot be read: {error}; {advice}") from error
        if not intact:
            raise DamagedStore(
                f"clip {name!r}: the bytes of {array.name} in {file.path} are not those that were committed; {advice}"
            )

    def _shard(self, shard: int, commit: int) -> OpenShard:
        # A later commit puts other files in place, so the commit is part of the key.
        key = (shard, commit)
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                opened = self._open[key] = self._files.open(self._root, self._spec, shard)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(key)
        return opened
