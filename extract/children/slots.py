"""Memory that a process shares with its children: large arrays are written there once and never pickled.

It has no name, so nothing is left behind when a process is killed, and it takes no space in /dev/shm, which is small in
containers. It grows as it is written, up to its size, and is freed when the last process that uses it ends.
"""

import mmap
import os
import tempfile
from collections import deque
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedSlots:
    """`count` pieces of memory of `slot_bytes` bytes each. It can be sent to a child that is being started.

    Only the parent takes slots and gives them back, so a killed child costs no slot.

    Args:
        count: Number of slots.
        slot_bytes: Bytes of each, rounded up to whole pages.
        holds: What is kept in them, for messages.
        lower: The options that make them smaller, for messages.

    Raises:
        OSError: The limits of this process leave no room for it.
    """

    def __init__(self, count: int, slot_bytes: int, holds: str, lower: str) -> None:
        size = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        file = _unnamed_file(holds, count * size)
        try:
            os.ftruncate(file, count * size)
            self._map(file, count, size)
        except OSError as error:
            os.close(file)
            raise OSError(
                f"no room for {count * size / 1e9:.2f} GB of {holds} ({error.strerror}); lower {lower}, or raise this "
                "process's limits on memory and on the size of files"
            ) from error

    def _map(self, file: int, count: int, slot_bytes: int) -> None:
        self._file = file
        self.count = count
        self.slot_bytes = slot_bytes
        self._free = deque(range(count))
        self._bytes = np.frombuffer(mmap.mmap(file, count * slot_bytes), np.uint8).reshape(count, slot_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (DupFd(self._file), self.count, self.slot_bytes)

    def take(self) -> int:
        """Take a free slot; there must be one."""
        assert self._free, f"all {self.count} slots are in use; give one back first"
        return self._free.pop()  # the slot that was freed last: slots that are never used take no memory

    def give_back(self, slot: int) -> None:
        """Declare a slot free; its content must not be used any more. Any thread may call this."""
        self._free.append(slot)

    def memory(self, slot: int) -> NDArray[np.uint8]:
        """The slot's bytes, which both sides may read and write."""
        return self._bytes[slot]

    def offset_of(self, content: NDArray[Any]) -> int | None:
        """Offset of contiguous memory in bytes from the start of the first slot; None if it is not in the slots."""
        offset = content.ctypes.data - self._bytes.ctypes.data
        return offset if 0 <= offset < self._bytes.size else None

    def at(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes that begin at an offset from `offset_of`, in any process that shares the slots."""
        return self._bytes.reshape(-1)[offset : offset + nbytes]

    def close(self) -> None:
        """Stop using the slots; the memory is freed when no array refers to it any more."""
        os.close(self._file)
        del self._bytes


def _attach(file: Any, count: int, slot_bytes: int) -> SharedSlots:
    slots = SharedSlots.__new__(SharedSlots)
    slots._map(file.detach(), count, slot_bytes)
    return slots


_inherited: list[SharedSlots] = []  # in a child of one pool: set when it starts


def inherit(slots: SharedSlots) -> None:
    """Store the slots that this child process received from its parent when it started."""
    _inherited[:] = [slots]


def inherited() -> SharedSlots:
    """The slots that `inherit` has kept in this process."""
    return _inherited[0]


def _unnamed_file(holds: str, size: int) -> int:
    """A file that only its handles can reach; in memory if the system can, else on disk."""
    try:
        return os.memfd_create("egopatch-slots")
    except (AttributeError, OSError) as error:
        print(
            f"note: {holds} are kept in a file of up to {size / 1e9:.1f} GB in {tempfile.gettempdir()}, because this "
            f"system has no anonymous shared memory ({error})",
            flush=True,
        )
        with tempfile.TemporaryFile() as unnamed:
            return os.dup(unnamed.fileno())
