"""Pinned memory, registered with CUDA: the GPU copies from it and to it without the CPU."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from egopatch.extract.errors import JobFailed

_STEP = 1 << 20  # bytes; a slot is registered as far as it is used, rounded up to this
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, which torch's binding of the runtime does not name


class PinnedSlots:
    """Slots that CUDA copies from directly: each is registered at its first use, and only as far as it was used.

    Registering takes the memory for good, and most slots would never be full.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def cover(self, memory: NDArray[np.uint8], used: int) -> None:
        """Register the first `used` bytes of a slot, unless this was done before.

        Raises:
            JobFailed: CUDA refuses.
        """
        address = memory.ctypes.data
        known = self._sizes.get(address, 0)
        if known >= used:
            return
        if known:
            self._release(address)
        size = min(-(-used // _STEP) * _STEP, memory.nbytes)
        _pin(memory[:size])
        self._sizes[address] = size

    def release(self) -> None:
        """Undo all registrations."""
        for address in tuple(self._sizes):
            self._release(address)

    def _release(self, address: int) -> None:
        _unregister(address)
        del self._sizes[address]


def pin_in_thread(device: torch.device, memory: NDArray[np.uint8]) -> None:
    """Pin `memory` for `device` in another thread, which starts on the first GPU.

    Raises:
        JobFailed: CUDA refuses.
    """
    torch.cuda.set_device(device)
    _pin(memory)


def unpin(memory: NDArray[np.uint8]) -> None:
    """Undo `pin_in_thread`.

    Raises:
        JobFailed: CUDA refuses.
    """
    _unregister(memory.ctypes.data)


def _pin(memory: NDArray[np.uint8]) -> None:
    result = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
    _require(result, f"pin {memory.nbytes} bytes of memory")


def _unregister(address: int) -> None:
    _require(torch.cuda.cudart().cudaHostUnregister(address), "release pinned memory")


def _require(result: Any, what: str) -> None:
    runtime = torch.cuda.cudart()
    if result != runtime.cudaError.success:
        remedy = "; free some memory and run the command again" if int(result) == _OUT_OF_MEMORY else ""
        raise JobFailed(f"CUDA cannot {what} ({runtime.cudaGetErrorString(result)}, error {int(result)}){remedy}")
