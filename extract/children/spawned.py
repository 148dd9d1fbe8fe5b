"""Child processes that are started afresh, do not outlive their parent, and finish what they do at signals to all.

A terminal and a scheduler signal every process of a job. What the signal means is up to the parent: it waits for what
is to be finished, and then kills its children.
"""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import synchronize
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Self

from pebble import ProcessFuture, ProcessPool

from egopatch.features.common.parent import exit_with_parent
from egopatch.features.common.signals import children_without_interrupts, signals_held


class _Child(SpawnProcess):
    """A process that is killed where pebble ends it by SIGTERM, which it ignores."""

    def terminate(self) -> None:
        """As multiprocessing's `kill`."""
        self.kill()


class _KeepingContext(SpawnContext):
    """Spawns children, because forked ones would inherit torch's and CUDA's threads and locks in an unknown state.

    It keeps the locks that it makes. pebble lets go of a pool's locks, which removes them, before it ends the children:
    one that is just starting would find them gone, and say so in a traceback.
    """

    Process = _Child

    def __init__(self) -> None:
        super().__init__()
        self.locks: list[synchronize.RLock] = []

    def RLock(self) -> synchronize.RLock:
        """As multiprocessing's."""
        lock = super().RLock()
        self.locks.append(lock)
        return lock


class SpawnedPool:
    """Child processes for short tasks; a context manager, whose end kills them.

    Args:
        doing: What the children do, such as `decoding`, for messages.
        workers: Number of children.
        initializer: Called in a child before its first task, with `initargs`; a child imports what it needs for them.
        initargs: May hold what only a child that is being started can receive, such as `SharedSlots`.

    Raises:
        ChildProcessError: No child can be started.
    """

    def __init__(self, doing: str, workers: int, initializer: Callable[..., None], *initargs: Any) -> None:
        require_semaphores(f"{doing} in child processes")
        self.doing = doing
        self._context = _KeepingContext()
        self._pool = ProcessPool(
            max_workers=workers, initializer=_start, initargs=(initializer, initargs), context=self._context
        )
        # Starts the children, and the threads that replace those that end. The tracker of semaphores, whose start would
        # let signals in again, runs since semaphores were required above.
        try:
            with children_without_interrupts():
                if not self._pool.active:  # an assert would start nothing under `python -O`
                    raise BrokenProcessPool
        except BrokenProcessPool as error:
            self.close()
            raise self.start_error() from error
        except BaseException:  # such as a Ctrl-C that came meanwhile, which is raised at the end of the block
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the children."""
        self._pool.stop()
        self._pool.join()
        self._context.locks.clear()

    def schedule(self, function: Callable[..., Any], *args: Any) -> ProcessFuture:
        """Have a child call `function`; its future raises `pebble.ProcessExpired` if the child dies meanwhile.

        Raises:
            ChildProcessError: A child has died while it had nothing to do, which ends the pool.
        """
        try:
            with signals_held():  # pebble's queue would not survive an exception in its midst
                return self._pool.schedule(function, args=args)
        except RuntimeError as error:
            raise self.start_error() from error

    def start_error(self) -> ChildProcessError:
        """The error to raise where the pool, or a future, is broken."""
        return ChildProcessError(
            f"the child processes for {self.doing} cannot be started, or were killed while they had no work; check "
            "the machine's free memory and its limit of processes, and run the same command again to resume"
        )


def _start(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    exit_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    initializer(*initargs)


def require_semaphores(purpose: str) -> None:
    """Check that processes can have semaphores, which the system keeps in /dev/shm.

    Args:
        purpose: What needs them, for the message.

    Raises:
        ChildProcessError: There can be none.
    """
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        raise ChildProcessError(
            f"/dev/shm: {error.strerror}; {purpose} needs semaphores there, a few kB: mount it for writing "
            "(`mount -o remount,rw,size=1g /dev/shm`; in Docker, --shm-size=1g)"
        ) from error
