"""Spawned child processes, which do not outlive their parent and keep working when the whole job is signalled.

A terminal and a scheduler signal every process of a job. Only the parent reacts: it waits for the work that must be
finished, and then kills its children.
"""

import multiprocessing
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import synchronize
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Self

from pebble import ProcessFuture, ProcessPool

from egopatch.features.common.parent import exit_with_parent
from egopatch.features.common.signals import SCHEDULER_SIGNALS, children_without_interrupts, signals_held


class _Child(SpawnProcess):
    """A process that `terminate` kills: pebble ends children by SIGTERM, which these ignore."""

    def terminate(self) -> None:
        """As multiprocessing's `kill`."""
        self.kill()


class _KeepingContext(SpawnContext):
    """Spawns children, because forked ones would inherit torch's and CUDA's threads and locks in an unknown state.

    It keeps a reference to each lock that it makes. pebble drops a pool's locks, which deletes them, before it ends the
    children: a child that is just starting would not find them, and would print a traceback.
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
    """Child processes for short tasks; a context manager that kills them at its end.

    Args:
        doing: What the children do, such as `decoding`, for messages.
        workers: Number of children.
        initializer: Called with `initargs` in each child before its first task; the child imports what this needs.
        initargs: May include objects that only a starting child can receive, such as `SharedSlots`.

    Raises:
        ChildProcessError: No child can be started.
    """

    def __init__(self, doing: str, workers: int, initializer: Callable[..., None], *initargs: Any) -> None:
        require_semaphores(f"{doing} in child processes")
        require_importable_program(f"{doing} in child processes")
        self.doing = doing
        self._context = _KeepingContext()
        self._pool = ProcessPool(
            max_workers=workers, initializer=_start, initargs=(initializer, initargs), context=self._context
        )
        # Starts the children, and the threads that replace children that end. The semaphore tracker, whose start would
        # unblock signals, is already running since `require_semaphores` above.
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
            with signals_held():  # an exception in the middle of it would break pebble's queue
                return self._pool.schedule(function, args=args)
        except RuntimeError as error:
            raise self.start_error() from error

    def start_error(self) -> ChildProcessError:
        """The error to raise when the pool or a future is broken."""
        return ChildProcessError(
            f"the child processes for {self.doing} cannot be started, or were killed while they were idle; check the "
            "machine's free memory and its limit on processes, and run the same command again to resume"
        )


def _start(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    exit_with_parent()
    for number in (signal.SIGINT, *SCHEDULER_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    initializer(*initargs)


def require_semaphores(purpose: str) -> None:
    """Check that semaphores can be created, which the system keeps in /dev/shm.

    Args:
        purpose: What needs them, for the message.

    Raises:
        ChildProcessError: They cannot be created.
    """
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        raise ChildProcessError(
            f"/dev/shm: {error.strerror}; {purpose} needs semaphores there, a few kB: mount it for writing "
            "(`mount -o remount,rw,size=1g /dev/shm`; in Docker, --shm-size=1g)"
        ) from error


def require_importable_program(purpose: str) -> None:
    """Check that spawned children can import the running program, as they do when they start.

    Args:
        purpose: What needs the children, for the message.

    Raises:
        ChildProcessError: Python reads the program from standard input.
    """
    if getattr(sys.modules["__main__"], "__file__", None) == "<stdin>":
        raise ChildProcessError(
            f"{purpose} needs a program in a file, which each child imports, but this one came through standard input "
            '(`python -`); save it to a file, with its calls below `if __name__ == "__main__":`, and run that'
        )
