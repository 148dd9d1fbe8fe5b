"""Reading rows from the disk into memory, each checked against the ledger."""

import resource
import shlex
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from egopatch.features.formats.interface import Format, OpenShard
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.ledger import ClipRecord, Commit
from egopatch.features.values.dtypes import disk_dtype, row_bytes
from egopatch.features.values.errors import DamagedStore, RequestFailed, StoreError
from egopatch.features.values.spec import ArraySpec
from egopatch.features.values.tensors import torch_dtype

_OPEN_FILES = 256  # or a quarter of those that the process may open
_CACHE_LINE = 64  # bytes; the kernel copies a file to an unaligned address at half the speed


class RowReader:
    """Reads committed rows of one store; safe to share between threads, not between processes."""

    def __init__(self, catalog: Catalog, file_format: Format) -> None:
        self._catalog = catalog
        self._file_format = file_format
        # Shard -> its commit, and the future of its open files; the most recently used shard is last.
        self._open: OrderedDict[int, tuple[Commit | None, Future[OpenShard]]] = OrderedDict()
        files = min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._most_open = max(files // len(file_format.file_names(catalog.spec, 0)), 1)
        self._indexes: dict[int, object] = {}
        # Neither is held while a file is read: threads wait for each other only where they need the same shard.
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()

    def read_row(self, name: str, array: ArraySpec) -> np.ndarray:
        """One row in its dtype on disk. Errors as in `Store.read`."""
        row = np.empty(array.shape, disk_dtype(array.dtype).numpy)
        self.read_into([(row.reshape(-1).view(np.uint8), array)], name, self._catalog.clip_records([name])[0])
        return row

    def read_into(self, targets: Sequence[tuple[np.ndarray, ArraySpec]], name: str, record: ClipRecord) -> None:
        """Fill each of `targets` with the clip's row of that array; all rows come from one commit.

        Args:
            targets: Memory for the bytes of a row, and the array.
            name: Id of the clip.
            record: The ledger's record of the clip.

        Raises:
            AbsentClip: The clip has been removed since.
            DamagedStore: The bytes differ from those that were committed; the message names the clip.
        """
        while True:
            commit = self._catalog.ledger.commits.get(self._catalog.shard_of(record.row))
            try:
                for target, array in targets:
                    self._read_committed(target, name, record, array)
                return
            except RequestFailed:
                raise  # a server that fails is not asked for news, which threads would wait for one after the other
            except StoreError:  # also that of a stale handle: another machine has replaced the file
                if not self._was_rewritten(name, record, commit):
                    raise
                # All arrays are read again, so that they come from one commit.
                record = self._catalog.clip_records([name])[0]

    def close(self) -> None:
        """Forget the open files, which are then closed once no thread reads them."""
        with self._lock:
            self._open.clear()

    def _was_rewritten(self, name: str, record: ClipRecord, commit: Commit | None) -> bool:
        """Whether the clip's shard was written again since this `commit`; if so, the catalog knows it now."""
        catalog, shard = self._catalog, self._catalog.shard_of(record.row)
        with self._refreshing:
            if catalog.ledger.commits.get(shard) is commit:  # else another thread has refreshed it meanwhile
                catalog.refresh(shard)
            clips = catalog.ledger.clips
            changed = name not in clips or clips[name].clip(name) != record
            return changed or catalog.ledger.commits.get(shard) is not commit

    def _read_committed(self, target: np.ndarray, name: str, record: ClipRecord, array: ArraySpec) -> None:
        root, spec = self._catalog.root, self._catalog.spec
        shard, slot = divmod(record.row, spec.shard)
        kind = "text" if spec.kind == "text" else "clip"
        advice = f"run `egopatch features verify {shlex.quote(str(root))}` and then `repair`"
        try:
            chunk = self._open_shard(shard).find_row(array, slot)
            intact = chunk.read_into(target) == record.checksums.get(array.name)
        except DamagedStore as error:
            raise DamagedStore(f"{kind} {name!r} cannot be read: {error}; {advice}") from error
        if not intact:
            raise DamagedStore(
                f"{kind} {name!r}: the bytes of {array.name} in {chunk.file.path} differ from those that were "
                f"committed; {advice}"
            )

    def _open_shard(self, shard: int) -> OpenShard:
        # A later commit puts other files in place. After a repair, its line may have the number of an earlier one.
        committed = self._catalog.ledger.commits.get(shard)
        with self._lock:
            former, opening = self._open.pop(shard, (None, None))
            current = opening if opening is not None and former is committed else None
            opened = current or Future[OpenShard]()
            self._open[shard] = committed, opened
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        if current is not None:
            return current.result()
        try:
            files = self._catalog.ledger.files_in(self._catalog.storage, shard)
            index = self._indexes.get(shard)
            opened.set_result(self._file_format.open(files, self._catalog.spec, shard, index))
            self._indexes[shard] = opened.result().index
        except BaseException as error:
            with self._lock:
                if self._open.get(shard, (None, None))[1] is opened:
                    del self._open[shard]
            if not opened.done():  # else a Ctrl-C came after the result was set
                opened.set_exception(error)
            raise
        return opened.result()


def empty_rows(array: ArraySpec, rows: int, pin: bool = False) -> Tensor:
    """Uninitialised memory for `rows` rows of `array`, as they are stored; pinned for copies to a GPU if requested."""
    dtype = torch_dtype(array.dtype)
    if pin:
        return torch.empty(rows, *array.shape, dtype=dtype, pin_memory=True)
    # Memory from NumPy comes in large pages; faulting in torch's small ones costs as much as reading into them.
    size = rows * row_bytes(array)
    whole = np.empty(size + _CACHE_LINE, np.uint8)
    first = -whole.ctypes.data % _CACHE_LINE
    return torch.from_numpy(whole[first : first + size]).view(dtype).view(rows, *array.shape)


def first_rows(array: ArraySpec, rows: int, out: Mapping[str, Tensor]) -> Tensor:
    """The first `rows` rows of the caller's buffer for `array`.

    Raises:
        StoreError: The buffer is missing or too small, or its shape, dtype or device is wrong.
    """
    dtype = torch_dtype(array.dtype)
    buffer = out.get(array.name)
    if (
        buffer is None
        or buffer.dtype != dtype
        or buffer.shape[1:] != array.shape
        or len(buffer) < rows
        or not buffer.is_contiguous()
        or buffer.device.type != "cpu"
    ):
        found = "nothing" if buffer is None else f"{tuple(buffer.shape)} {buffer.dtype} on {buffer.device}"
        raise StoreError(
            f"out has {found} for {array.name}; expected at least {(rows, *array.shape)} {dtype}, contiguous, on the "
            "CPU: create it with Store.buffers"
        )
    return buffer[:rows]
