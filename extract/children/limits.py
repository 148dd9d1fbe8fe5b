"""The time and the memory that a decoder child may use for one clip; a child that uses more ends itself.

Both limits work while FFmpeg hangs: the alarm's signal ends the process without Python's help, and a thread watches the
memory. They apply only while the child works on a clip: what it does in between is not that clip's fault.
"""

import ctypes
import functools
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from egopatch.configs.schema import VideoConfig

GIB = 1024**3
MEMORY_POLL_S = 0.02
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _LARGEST_KEPT = 1 << 26, 1 << 25  # free bytes kept at the heap's end, largest kept piece (glibc's limit)
OUT_OF_MEMORY = 117  # exit codes of a child that used too much memory,
OUT_OF_TIME = -signal.SIGALRM  # and of one that took too long
SLOWEST_BYTES_PER_S = 4e6  # reading a video through, on a network file system that many decoders share


def prepare_child(memory_gb: float) -> None:
    """Prepare this process, once, for clips within `limits`."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the process that started the job may have ignored it
    _keep_freed_memory()
    _memory_at_start()
    # The system's own limit catches growth that is faster than the polling. FFmpeg fails there without naming the
    # cause, so it is the wider of the two; it counts data, not the address space of idle threads.
    limit = psutil.Process().memory_info().data + 2 * int(memory_gb * GIB)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:  # a scheduler's own limit may be lower, and cannot be raised
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _keep_freed_memory() -> None:
    """Make the C library reuse a frame's memory for the next frame, which saves a tenth of a short clip's time."""
    with suppress(AttributeError, OSError):  # it is not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


@contextmanager
def limits(video: VideoConfig) -> Iterator[None]:
    """End this process if the block takes longer than `video.timeout_s` or more memory than `video.memory_gb`."""
    with _memory_watch().at_most(_memory_at_start() + int(video.memory_gb * GIB)):
        signal.setitimer(signal.ITIMER_REAL, video.timeout_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


class _MemoryWatch:
    """A thread that ends this process when it uses too much memory; it is started once, not for each clip."""

    def __init__(self) -> None:
        self._most: int | None = None
        self._working, self._ending = threading.Event(), threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def at_most(self, nbytes: int) -> Iterator[None]:
        """End this process if it uses more than `nbytes` while the block runs."""
        self._most = nbytes
        self._working.set()
        try:
            yield
        finally:
            self._working.clear()
            with self._ending:
                self._most = None

    def _watch(self) -> None:
        while self._working.wait():
            time.sleep(MEMORY_POLL_S)
            # The clip may leave no file handle or memory for this check; the next check may succeed.
            with suppress(OSError, MemoryError, psutil.Error), self._ending:
                if self._most is not None and _memory_in_use() > self._most:
                    os._exit(OUT_OF_MEMORY)


@contextmanager
def reading_through(nbytes: int) -> Iterator[None]:
    """Stop the clip's clock while the block reads a whole file, and give the block more time for a larger file."""
    with clock_stopped() as left_s:
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, left_s + nbytes / SLOWEST_BYTES_PER_S)
        yield


@contextmanager
def clock_stopped() -> Iterator[float]:
    """Stop the clip's clock during the block; yields the seconds that are left, 0 outside of `limits`."""
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield left_s
    finally:
        signal.setitimer(signal.ITIMER_REAL, left_s)


@functools.cache
def _memory_watch() -> _MemoryWatch:
    return _MemoryWatch()


@functools.cache
def _memory_at_start() -> int:
    return _memory_in_use()


def _memory_in_use() -> int:
    """Bytes that only this process uses: not libraries, and not the frames in memory shared with its parent."""
    memory = _process(os.getpid()).memory_info()
    return memory.rss - getattr(memory, "shared", 0)


@functools.cache
def _process(pid: int) -> psutil.Process:
    """The process, cached because finding it takes psutil longer than reading its memory use."""
    return psutil.Process(pid)
