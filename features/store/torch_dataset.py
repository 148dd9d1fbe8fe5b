"""The clips of a store as a map-style dataset of torch, for training loops of your own.

    clips = torch_dataset(store)
    loader = DataLoader(clips, batch_size=32, shuffle=True, num_workers=2, collate_fn=clips.collate)

Batches are large: 16 clips of EgoVLPv2 are 77 MB. Fresh shared memory for each batch would take longer than reading it,
because both processes fault in every page. So a worker keeps its shared memory, and fills it again once the last tensor
in it is dropped.
"""

import math
import multiprocessing
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, SupportsIndex, overload
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from egopatch.features.store.store import Store, open_store
from egopatch.features.values.errors import one_line, require_ids, require_type
from egopatch.features.values.spec import TOKEN_ARRAYS, PatchTokens
from egopatch.features.values.tensors import torch_dtype

_LINE = 64  # bytes; tensors are aligned to such lines, and the first line of a slot is its flag
# Token -> dataset of this process, which keeps the memory that workers send mapped.
_DATASETS: "WeakValueDictionary[str, ClipDataset]" = WeakValueDictionary()


def torch_dataset(
    store: Store, clip_ids: Iterable[str] | None = None, dtype: torch.dtype | None = None
) -> "ClipDataset":
    """The clips of `store` as a dataset.

    Args:
        store: Store of clips.
        clip_ids: Clips and their order; by default all committed clips.
        dtype: Dtype of `patches` and `coarse`, by default the stored one; as in `Store.read`.

    Raises:
        AbsentClip: Some of `clip_ids` were never committed; the message names them.
        StoreError: `store` holds texts.
        TypeError: `store` is not an open store, or `clip_ids` is one id or no list.
        ValueError: `dtype` is not a floating-point dtype of torch.
    """
    require_type("store", store, Store, "an open store: open_store(path)")
    store.read((), dtype)
    if clip_ids is None:
        clip_ids = store.clip_ids
    else:
        require_ids(clip_ids)
        clip_ids = tuple(clip_ids)  # a generator ends after one pass
    store.catalog.clip_records(clip_ids)
    return ClipDataset(store, clip_ids, dtype)


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips by index, created by `torch_dataset`. Workers of a `DataLoader` may be forked or spawned; for a store in
    object storage, whose client does not survive a fork, only spawned.

    Item `i` is a dict: `clip_id`, and the clip's tensors without the batch: `patches` [T, N, D], `cls` [D], `saliency`
    [T, N], `timestamps` [T] and others as in `PatchTokens`.

    Attributes:
        clip_ids: Ids of the clips, in order.
    """

    def __init__(self, store: Store, clip_ids: Sequence[str], dtype: torch.dtype | None) -> None:
        self.clip_ids = tuple(clip_ids)
        self._store, self._dtype = store, dtype
        self._process = os.getpid()
        self._slots: list[_Slot] = []  # of a worker
        self._mapped: dict[tuple[int, int], Tensor] = {}  # memory of workers' slots, in the process that trains
        self._token = uuid.uuid4().hex
        _DATASETS[self._token] = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slots": [], "_mapped": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process=os.getpid())

    def __len__(self) -> int:
        return len(self.clip_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not isinstance(index, SupportsIndex):
            raise TypeError(f"index is {one_line(index)}; expected a number; clip_ids lists the clips in order")
        if not -len(self) <= index < len(self):  # an IndexError, by which a plain loop ends
            raise IndexError(f"index is {index}; this dataset has {len(self)} clips")
        name = self.clip_ids[index]
        return {"clip_id": name, **{array: rows[0] for array, rows in self.read([name]).items()}}

    def __getitems__(self, indices: Sequence[int]) -> "_Clips":
        """The clips of one batch, which are read together; `DataLoader` calls this."""
        return _Clips(self, [self.clip_ids[index] for index in indices])

    def collate(self, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch for `DataLoader(collate_fn=...)`: `clip_id` is a list, and tensors have the batch first.

        torch's own collate gives the same batches, more slowly.

        Raises:
            TypeError: `clips` is one item, since the loader makes no batches; or it is no list of items.
        """
        if isinstance(clips, Mapping):
            raise TypeError(
                "collate was given one item; expected a list: set the DataLoader's batch_size or batch_sampler,"
                " or leave out collate_fn"
            )
        if not isinstance(clips, _Clips):  # looking at the items of these would read them
            if not isinstance(clips, Sequence) or not clips or not all(isinstance(clip, Mapping) for clip in clips):
                raise TypeError(f"collate was given {one_line(clips)}; expected a list of items of this dataset")
            return default_collate(list(clips))
        batch: dict[str, Any] = {"clip_id": list(clips.ids)}
        if get_worker_info() is None:
            return batch | self.read(clips.ids)
        return _SharedBatch(batch, self._fill_slot(clips.ids), self._token)

    def read(self, ids: Sequence[str], out: PatchTokens | None = None) -> dict[str, Tensor]:
        """The tensors of `ids` by name, with the batch first."""
        if self._process != os.getpid():  # a forked worker: open files and locks are not shared
            path = self._store.catalog.storage.full_location
            self._store, self._process = open_store(path, self._store.fingerprint), os.getpid()
        return self._store.read_arrays(ids, self._dtype, out)

    def keep_mapped(self, worker: int, number: int, memory: Tensor) -> None:
        """Keep a worker's memory mapped in this process; memory of workers that have ended is dropped."""
        if (worker, number) not in self._mapped:
            alive = {child.pid for child in multiprocessing.active_children()}
            self._mapped = {key: kept for key, kept in self._mapped.items() if key[0] in alive}
            self._mapped[worker, number] = memory

    def _fill_slot(self, ids: Sequence[str]) -> "_Slot":
        arrays = [array for array in self._store.spec.arrays if self._dtype is None or array.name != "scale"]
        layout = {
            array.name: (
                (len(ids), *array.shape),
                self._dtype if self._dtype is not None and array.name in TOKEN_ARRAYS else torch_dtype(array.dtype),
            )
            for array in arrays
        }
        size = _offsets(layout)[-1]
        free = (slot for slot in self._slots if not slot.memory[0] and len(slot.memory) >= size)
        slot = next(free, None)
        if slot is None:
            slot = _Slot(len(self._slots), torch.zeros(size, dtype=torch.uint8).share_memory_())
            self._slots.append(slot)
        slot.layout = layout
        tensors = _views(slot.memory, layout)
        if self._dtype is None:
            self.read(ids, PatchTokens(**tensors))
        else:
            for name, rows in self.read(ids).items():
                tensors[name].copy_(rows)
        slot.memory[0] = 1
        return slot


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class _Slot:
    """Shared memory of a worker for one batch. Its first byte is 1 while the process that trains uses it."""

    def __init__(self, number: int, memory: Tensor) -> None:
        self.number, self.memory = number, memory
        self.layout: Layout = {}


class _Clips(Sequence[dict[str, Any]]):
    """The clips of a batch, which are all read when the first is accessed."""

    def __init__(self, dataset: ClipDataset, ids: Sequence[str]) -> None:
        self.dataset, self.ids = dataset, ids
        self._tensors: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        if self._tensors is None:
            self._tensors = self.dataset.read(self.ids)
        return {"clip_id": self.ids[index], **{name: rows[index] for name, rows in self._tensors.items()}}


class _SharedBatch(dict[str, Any]):
    """A batch on its way from a worker; the process that receives it gets a plain dict."""

    def __init__(self, batch: dict[str, Any], slot: _Slot, token: str) -> None:
        super().__init__(batch)
        self._slot, self._token = slot, token

    def __reduce__(self) -> Any:
        slot = self._slot
        return _receive, (dict(self), self._token, os.getpid(), slot.number, slot.memory, slot.layout)


def _receive(
    batch: dict[str, Any], token: str, worker: int, number: int, memory: Tensor, layout: Layout
) -> dict[str, Any]:
    # torch maps shared memory anew for each batch, unless an earlier tensor of the same memory is alive.
    dataset = _DATASETS.get(token)
    if dataset is not None:
        dataset.keep_mapped(worker, number, memory)
    return batch | _views(torch.from_numpy(np.asarray(_InUse(memory))), layout)


class _InUse:
    """The memory of a slot for NumPy; once no array or tensor refers to it any more, the worker may fill it again.

    A process that is forked has a copy of this object, whose end says nothing about the tensors of its parent.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._process = memory, os.getpid()
        self.__array_interface__ = memory.numpy().__array_interface__

    def __del__(self) -> None:
        if os.getpid() == self._process:
            self._memory[0] = 0


def _views(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors that lie in `memory`, by name."""
    offsets = _offsets(layout)
    return {
        name: memory[start : start + _nbytes(shape, dtype)].view(dtype).view(shape)
        for start, (name, (shape, dtype)) in zip(offsets, layout.items())
    }


def _offsets(layout: Layout) -> list[int]:
    """Offset of each tensor in a slot, and, last, the size of the slot."""
    sizes = (-(-_nbytes(shape, dtype) // _LINE) * _LINE for shape, dtype in layout.values())
    return list(accumulate(sizes, initial=_LINE))


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
