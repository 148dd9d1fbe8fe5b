"""Memory for what a device has computed, pinned once and used again when the rows in it are dropped."""

import queue
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egopatch.extract.children.slots import SharedSlots
from egopatch.features.common.signals import signals_held

_ALIGNMENT = 64
_ARRAYS = 8  # more than a batch has; each begins at a multiple of the alignment
_FIRST = 3  # buffers that are pinned before any is needed: one is filled while the rows of two are gathered


class ResultMemory:
    """Buffers on the host for the tensors of one batch each, in memory that other processes can share.

    Pinning takes longer than encoding, so a thread does it ahead: for the first batches while the decoders start.

    Args:
        batches: Largest number of buffers; memory is taken only for those that are used.
        nbytes: Bytes of a buffer.
        pin: Called with new memory, in the thread.
        unpin: Called with the same memory at the end.

    Attributes:
        slots: The memory, a slot for each buffer.
    """

    def __init__(
        self,
        batches: int,
        nbytes: int,
        pin: Callable[[NDArray[np.uint8]], None],
        unpin: Callable[[NDArray[np.uint8]], None],
    ) -> None:
        self.slots = SharedSlots(
            batches, nbytes + _ARRAYS * _ALIGNMENT, "encoded batches", "store.shard, of a new store,"
        )
        self._pin = pin
        self._unpin = unpin
        self._pinned: list[NDArray[np.uint8]] = []
        self._free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="results")
        self._coming = deque(self._submit() for _ in range(min(_FIRST, batches)))

    @property
    def buffers(self) -> int:
        """Number of buffers so far, without those that are being pinned."""
        return len(self._pinned)

    def close(self) -> None:
        """Undo the pinning; rows that are still used stay valid."""
        self._thread.shutdown(cancel_futures=True)
        for memory in self._pinned:
            self._unpin(memory)
        self._pinned.clear()
        self.slots.close()

    def empty_like(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the host of the same shapes and dtypes, in a free buffer; it is free again when all are dropped.

        Raises:
            JobFailed: Memory cannot be pinned.
        """
        starts, end = [], 0
        for tensor in tensors.values():
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        assert end <= self.slots.slot_bytes, f"a batch has {end} bytes; its memory has {self.slots.slot_bytes}"
        memory = torch.from_numpy(self._take())
        return {
            name: memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, (name, tensor) in zip(starts, tensors.items(), strict=True)
        }

    def _take(self) -> NDArray[np.uint8]:
        try:
            memory = self._free.get_nowait()
        except queue.Empty:
            memory = (self._coming.popleft() if self._coming else self._submit()).result()
            if not self._coming and self.buffers < self.slots.count:
                # All buffers so far are in use, so the next batch will need a new one too.
                self._coming.append(self._submit())
        # torch keeps this view as long as there is a tensor in it.
        view = memory[:]
        weakref.finalize(view, self._free.put, memory).atexit = False
        return view

    def _submit(self) -> Future[NDArray[np.uint8]]:
        with signals_held():  # an exception while a thread starts leaves one that is never told to end
            return self._thread.submit(self._make)

    def _make(self) -> NDArray[np.uint8]:
        memory = self.slots.memory(self.slots.take())
        self._pin(memory)
        self._pinned.append(memory)
        return memory
