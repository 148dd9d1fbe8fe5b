"""Memory that a process shares with its children: what is large is written there once and never pickled.

It has no name, so nothing is left behind, whoever is killed; and it takes nothing of /dev/shm, which is small in
containers. It grows with what was written into it, up to its size, and is freed with its last process.
"""

import mmap
import os
import tempfile
from collections import deque
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ring:
    """`slots` pieces of memory of `slot_bytes` bytes each. It can be sent to a child that is being started.

    Only the parent takes slots and gives them back, so a killed child costs no slot.

    Args:
        slots: Number of slots.
        slot_bytes: Bytes of each, rounded up to whole pages.
        holds: What is kept in it, for messages.
        lower: The options that make it smaller, for messages.

    Raises:
        OSError: The limits of this process leave no room for it.
    """

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        holds: str = "frames between decoders and encoder",
        lower: str = "engine.decoders",
    ) -> None:
        size = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        file = _unnamed_file(holds, slots * size)
        try:
            os.ftruncate(file, slots * size)
            self._map(file, slots, size)
        except OSError as error:
            os.close(file)
            raise OSError(
                f"no room for {slots * size / 1e9:.2f} GB of {holds} ({error.strerror}); lower {lower}, or raise this "
                "process's limits on memory and on the size of files"
            ) from error

    def _map(self, file: int, slots: int, slot_bytes: int) -> None:
        self._file = file
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._free = deque(range(slots))
        self._bytes = np.frombuffer(mmap.mmap(file, slots * slot_bytes), np.uint8).reshape(slots, slot_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (DupFd(self._file), self.slots, self.slot_bytes)

    def take(self) -> int:
        """A slot that is free now."""
        assert self._free, f"all {self.slots} slots of the ring are in use; its user must give slots back first"
        return self._free.pop()  # the one that was used last: others may never be needed, and take no memory then

    def give_back(self, slot: int) -> None:
        """Declare a slot free; its content must not be used any more. Any thread may call this."""
        self._free.append(slot)

    def memory(self, slot: int) -> NDArray[np.uint8]:
        """The slot's bytes, which both sides may read and write."""
        return self._bytes[slot]

    def offset_of(self, content: NDArray[Any]) -> int | None:
        """Where contiguous memory begins in the ring, in bytes; None for memory that is not in it."""
        offset = content.ctypes.data - self._bytes.ctypes.data
        return offset if 0 <= offset < self._bytes.size else None

    def at(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the ring that begin at an offset, in any process that shares it."""
        return self._bytes.reshape(-1)[offset : offset + nbytes]

    def close(self) -> None:
        """End the use of the ring; the memory is freed with the last clip in it."""
        os.close(self._file)
        del self._bytes


def _attach(file: Any, slots: int, slot_bytes: int) -> Ring:
    ring = Ring.__new__(Ring)
    ring._map(file.detach(), slots, slot_bytes)
    return ring


def _unnamed_file(holds: str, size: int) -> int:
    """A file that only its handles can reach; in memory if the system can, else on disk."""
    try:
        return os.memfd_create("egopatch-ring")
    except (AttributeError, OSError) as error:
        print(
            f"note: {holds} are kept in a file in {tempfile.gettempdir()} of up to {size / 1e9:.1f} GB, because this"
            f" system gives no shared memory without a name ({error})",
            flush=True,
        )
        with tempfile.TemporaryFile() as unnamed:
            return os.dup(unnamed.fileno())
