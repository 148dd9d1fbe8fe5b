"""Memory that the decoder children share with their parent: a clip's frames are written there once and never pickled.

It has no name, so nothing is left behind, whoever is killed; and it takes nothing of /dev/shm, which is small in
containers. It grows with the frames that were written into it, up to its size, and is freed with its last process.
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

    The parent takes a slot for a clip, a child fills it, and the parent gives it back when the frames were used; so a
    killed child costs no slot.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        size = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map(_unnamed_file(slots * size), slots, size)

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

    def close(self) -> None:
        """End the use of the ring; the memory is freed with the last clip in it."""
        os.close(self._file)
        del self._bytes


def _attach(file: Any, slots: int, slot_bytes: int) -> Ring:
    ring = Ring.__new__(Ring)
    ring._map(file.detach(), slots, slot_bytes)
    return ring


def _unnamed_file(size: int) -> int:
    """A file of `size` zeros that only its handles can reach; in memory if the system can, else on disk."""
    try:
        file = os.memfd_create("egopatch-frames")
    except (AttributeError, OSError) as error:
        print(
            f"note: frames are handed over through a file in {tempfile.gettempdir()} of up to {size / 1e9:.1f} GB,"
            f" because this system gives no shared memory without a name ({error})",
            flush=True,
        )
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    try:
        os.ftruncate(file, size)
    except OSError as error:
        os.close(file)
        raise OSError(
            f"no room for {size / 1e9:.2f} GB of frames between decoders and encoder ({error.strerror}); lower "
            "engine.decoders, or raise this process's limits on memory and on the size of files"
        ) from error
    return file
