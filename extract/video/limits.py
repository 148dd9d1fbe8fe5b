"""The time and the memory that a decoder child may use for one clip; a child that uses more ends itself.

Both limits work while FFmpeg hangs: the alarm's signal ends the process without any help of Python, and a thread
watches the memory. They hold only while the child works on a clip, because a child that ended while it receives or
returns one would leave the other children's queue locked.
"""

import functools
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from egopatch.configs.schema import VideoConfig

GIB = 1024**3
MEMORY_POLL_S = 0.02
OUT_OF_MEMORY = 117  # exit codes of a child that used too much memory,
OUT_OF_TIME = -signal.SIGALRM  # and of one that took too long
SLOWEST_BYTES_PER_S = 4e6  # reading a video through, on a network file system that many decoders share


def prepare_child(memory_gb: float) -> None:
    """Prepare this process, once, for clips within `limits`."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it may have been ignored where the job was started
    _memory_at_start()
    # The system's own limit catches growth that is faster than the polling. FFmpeg fails there without naming the
    # cause, so it is the wider of the two; it counts data, not the address space of idle threads.
    limit = psutil.Process().memory_info().data + 2 * int(memory_gb * GIB)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:  # a scheduler's own limit may be lower, and cannot be raised
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@contextmanager
def limits(video: VideoConfig) -> Iterator[None]:
    """End this process if the block takes longer than `video.timeout_s` or more memory than `video.memory_gb`."""
    done, ending = threading.Event(), threading.Lock()
    most = _memory_at_start() + int(video.memory_gb * GIB)

    def watch() -> None:
        while not done.wait(MEMORY_POLL_S):
            if _memory_in_use() > most:
                with ending:
                    if not done.is_set():
                        os._exit(OUT_OF_MEMORY)

    threading.Thread(target=watch, daemon=True).start()
    signal.setitimer(signal.ITIMER_REAL, video.timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with ending:
            done.set()


@contextmanager
def reading_through(nbytes: int) -> Iterator[None]:
    """A block that reads a whole file: the clip's time stands still, and the time for the block grows with the file."""
    with clock_stopped() as left_s:
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, left_s + nbytes / SLOWEST_BYTES_PER_S)
        yield


@contextmanager
def waiting_for_another_child() -> Iterator[None]:
    """A block that waits while another child works, which has limits of its own: the clip's time stands still."""
    with clock_stopped():
        yield


@contextmanager
def clock_stopped() -> Iterator[float]:
    """A block that does not count for the clip's time; yields the time that is left, 0 outside of `limits`."""
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield left_s
    finally:
        signal.setitimer(signal.ITIMER_REAL, left_s)


@functools.cache
def _memory_at_start() -> int:
    return _memory_in_use()


def _memory_in_use() -> int:
    """Bytes of this process alone: frames in memory that it shares with its parent, and libraries, are not its own."""
    memory = _process(os.getpid()).memory_info()
    return memory.rss - getattr(memory, "shared", 0)


@functools.cache
def _process(pid: int) -> psutil.Process:
    """The process, which psutil takes longer to find than to ask for its memory."""
    return psutil.Process(pid)
