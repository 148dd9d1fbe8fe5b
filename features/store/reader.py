"""The reading side: rows off the disk into memory, each checked against the ledger."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from egopatch.features.formats.interface import Format, OpenShard
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.ledger import ClipRecord
from egopatch.features.values.dtypes import row_bytes, stored
from egopatch.features.values.encoding import dequantise
from egopatch.features.values.errors import DamagedStore, StoreError
from egopatch.features.values.spec import TOKENS, ArraySpec, StoreSpec
from egopatch.features.values.tensors import bytes_of, torch_dtype

_OPEN_SHARDS = 64
_LINE = 64  # bytes of a cache line: the kernel copies a file to an odd place at half the speed


class Reader:
    """Reads what a catalog lists; safe to share between threads, not between processes."""

    def __init__(self, catalog: Catalog, files: Format) -> None:
        self._catalog = catalog
        self._files = files
        self._open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self,
        ids: Sequence[str],
        dtype: torch.dtype | None = None,
        out: Mapping[str, Tensor] | None = None,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        """Every array's rows [len(ids), *row] of `ids`, in that order; arguments and errors as in `Store.read`."""
        records = self._catalog.records(ids)
        tensors = {array.name: _buffer(array, len(ids), out) for array in self._catalog.spec.arrays}
        rows = [
            (array, bytes_of(tensors[array.name]).reshape(len(ids), row_bytes(array)))
            for array in self._catalog.spec.arrays
        ]

        def read_clip(place: int) -> None:
            for array, targets in rows:
                self._read_row(ids[place], records[place], array, targets[place])

        threads = max(threads, self._catalog.storage.parallel)
        if threads == 1 or len(ids) == 1:
            for place in range(len(ids)):
                read_clip(place)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
                for _ in pool.map(read_clip, range(len(ids))):
                    pass
        return tensors if dtype is None else _converted(tensors, dtype)

    def read_row(self, name: str, array: ArraySpec) -> np.ndarray:
        """One row as it lies on the disk. Errors as in `read`."""
        row = np.empty(array.shape, stored(array.dtype).disk)
        self._read_row(name, self._catalog.records([name])[0], array, row.reshape(-1).view(np.uint8))
        return row

    def close(self) -> None:
        """Forget the open files; those that nobody reads any more are closed."""
        with self._lock:
            self._open.clear()

    def _read_row(self, name: str, record: ClipRecord, array: ArraySpec, target: np.ndarray) -> None:
        try:
            self._read_committed(name, record, array, target)
        except DamagedStore:
            if not self._superseded(record):
                raise
            self._read_committed(name, self._catalog.records([name])[0], array, target)

    def _superseded(self, record: ClipRecord) -> bool:
        """Whether a later commit has put other files in the place of those that this reader knows."""
        catalog, shard = self._catalog, self._catalog.shard_of(record.row)
        if catalog.storage.in_place:
            return False  # there open files stay as they are, and the name leads to the later ones
        with self._lock:
            before = catalog.ledger.attempts.get(shard)
            catalog.refresh(shard)
            return catalog.ledger.attempts.get(shard) != before

    def _read_committed(self, name: str, record: ClipRecord, array: ArraySpec, target: np.ndarray) -> None:
        root, spec = self._catalog.root, self._catalog.spec
        shard, slot = divmod(record.row, spec.shard)
        advice = f"run `python -m features verify {root}` and then `repair`"
        try:
            chunk = self._shard(shard).find(array, slot)
            intact = chunk.read_into(target) == record.checksums.get(array.name)
        except DamagedStore as error:
            raise DamagedStore(f"clip {name!r} cannot be read: {error}; {advice}") from error
        if not intact:
            raise DamagedStore(
                f"clip {name!r}: the bytes of {array.name} in {chunk.file.path} are not those that were committed; "
                f"{advice}"
            )

    def _shard(self, shard: int) -> OpenShard:
        # A later commit puts other files in place, so the commit is part of the key.
        key = (shard, self._catalog.ledger.commits[shard])
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                files = self._catalog.shard_files(shard)
                opened = self._open[key] = self._files.open(files, self._catalog.spec, shard)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(key)
        return opened


def make_buffers(spec: StoreSpec, rows: int, pin: bool) -> dict[str, Tensor]:
    """Memory for `rows` rows of every array, as they are stored."""
    return {
        array.name: torch.empty(rows, *array.shape, dtype=torch_dtype(array.dtype), pin_memory=True)
        if pin
        else _memory(array, rows)
        for array in spec.arrays
    }


def _buffer(array: ArraySpec, rows: int, out: Mapping[str, Tensor] | None) -> Tensor:
    """[rows, *row] to read into: new, or the first rows of what the caller gave."""
    if out is None:
        return _memory(array, rows)
    dtype = torch_dtype(array.dtype)
    given = out.get(array.name)
    wrong = given is None or given.dtype != dtype or given.shape[1:] != array.shape or len(given) < rows
    if given is None or wrong or not given.is_contiguous() or given.device.type != "cpu":
        found = "nothing" if given is None else f"{tuple(given.shape)} {given.dtype} on {given.device}"
        raise StoreError(
            f"out has {found} for {array.name}; expected at least {(rows, *array.shape)} {dtype}, contiguous, on the "
            "CPU: make it with Store.buffers"
        )
    return given[:rows]


def _memory(array: ArraySpec, rows: int) -> Tensor:
    """[rows, *row] from NumPy, which asks for large pages: torch's small ones cost as much as reading into them."""
    size = rows * row_bytes(array)
    whole = np.empty(size + _LINE, np.uint8)
    first = -whole.ctypes.data % _LINE
    return torch.from_numpy(whole[first : first + size]).view(torch_dtype(array.dtype)).view(rows, *array.shape)


def _converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tokens in `dtype`, multiplied by their scale where they were stored in few bits."""
    scale = tensors.pop("scale", None)
    converted = {name: tensor.to(dtype) if name in TOKENS else tensor for name, tensor in tensors.items()}
    if scale is not None:
        converted["patches"] = dequantise(tensors["patches"], scale, dtype)
    return converted
