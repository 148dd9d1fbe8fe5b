"""Spawned child processes, which do not outlive their parent and keep working when the whole job is signalled.

A terminal and a scheduler signal every process of a job. Only the parent reacts: it waits for the work that must be
finished, and then kills its children.
"""

import multiprocessing
import os
import pickle
import selectors
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self

from egopatch.features.common.child_errors import ChildTraceback, sendable
from egopatch.features.common.parent import exit_with_parent
from egopatch.features.common.signals import SCHEDULER_SIGNALS, blocked_in_children, signals_held

FAILED_STARTS = 3  # children in a row that end before they are ready: the next one would, too


class ChildDied(Exception):
    """A child ended in the middle of a task.

    Attributes:
        exit_code: Its exit code; -N if signal N killed it.
    """

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"a child process ended in the middle of a task, with exit code {exit_code}")
        self.exit_code = exit_code


class _Process(SpawnProcess):
    """A process that `terminate` kills, as Python does at its end: children ignore SIGTERM."""

    def terminate(self) -> None:
        """As multiprocessing's `kill`."""
        self.kill()


class _Context(SpawnContext):
    """Spawns children, because forked ones would inherit torch's and CUDA's threads and locks in an unknown state."""

    Process = _Process


@dataclass(frozen=True)
class _Task:
    """A pickled call, and the future that gets its result."""

    call: bytes
    future: Future[Any]


@dataclass(eq=False)
class _Child:
    """A process, this end of the pipe to it, whether it still imports what it needs, and the task it works on."""

    process: SpawnProcess
    pipe: Connection
    starting: bool = True
    task: _Task | None = None


class SpawnedPool:
    """Child processes for short tasks; a context manager that kills them at its end.

    A thread gives tasks to children that have nothing to do, each through a pipe of its own. So it is always known what
    a child that ends was doing, and no child can leave a lock or half a message in another's way.

    Args:
        doing: What the children do, such as `decoding`, for messages.
        workers: Number of children.
        initializer: Called with `initargs` in each child before its first task; the child imports what this needs.
        initargs: May include objects that only a starting child can receive, such as `SharedSlots`.

    Raises:
        ChildProcessError: No child can be started.
    """

    def __init__(self, doing: str, workers: int, initializer: Callable[..., None], *initargs: Any) -> None:
        require_importable_program(f"{doing} in child processes")
        self.doing = doing
        self._workers = workers
        self._start_with = (initializer, initargs)
        self._children: list[_Child] = []
        self._failed_starts = 0
        self._lock = threading.Lock()  # of the two below
        self._waiting: deque[_Task] = deque()
        self._ended = False
        self._closing = False
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._pipes = selectors.DefaultSelector()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(started,), name=f"{doing} children", daemon=True)
        resource_tracker.ensure_running()  # its start unblocks signals, and the first child would start it
        try:
            # An exception in between would leave the thread behind.
            with signals_held(), blocked_in_children(signal.SIGINT):
                self._thread.start()
            started.result()
        except BaseException:  # such as a Ctrl-C meanwhile
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the children; tasks that are not finished raise `ChildProcessError`."""
        self._closing = True
        self._notify()
        self._thread.join()

    def schedule(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Have a child call `function`; the future raises `ChildDied` if the child ends meanwhile.

        Raises:
            ChildProcessError: No child can be started any more; the future may raise it too.
        """
        task = _Task(bytes(ForkingPickler.dumps((function, args))), Future())
        with self._lock:
            if self._ended:
                raise self._start_error()
            self._waiting.append(task)
        self._notify()
        return task.future

    def _notify(self) -> None:
        with self._lock, suppress(BlockingIOError):  # it is full, so the thread will wake up
            if not self._ended:
                os.write(self._wake, b"\0")

    def _serve(self, started: Future[None]) -> None:
        """Start the children and pass tasks and results, until the pool is closed or no child can be started."""
        error: BaseException | None = None
        try:
            self._pipes.register(self._woken, selectors.EVENT_READ)
            for _ in range(self._workers):
                self._start()
            started.set_result(None)
            while not self._closing:
                self._give_tasks()
                for key, _ in self._pipes.select():
                    if key.data is None:
                        os.read(self._woken, 4096)
                    else:
                        self._hear(key.data)
        except (OSError, EOFError) as failed:
            error = failed
        finally:
            self._end(started, error)

    def _start(self) -> None:
        pipe, theirs = multiprocessing.Pipe()
        with theirs:
            process = _Context().Process(target=_work, args=(theirs, *self._start_with), daemon=True)
            try:
                process.start()
            except BaseException:
                pipe.close()
                raise
        child = _Child(process, pipe)
        self._children.append(child)
        self._pipes.register(pipe, selectors.EVENT_READ, child)

    def _give_tasks(self) -> None:
        for child in self._children:
            if child.starting or child.task is not None:
                continue
            with self._lock:
                if not self._waiting:
                    return
                child.task = self._waiting.popleft()
            try:
                child.pipe.send_bytes(child.task.call)
            except OSError:  # it has just ended, which its pipe will tell
                with self._lock:
                    self._waiting.appendleft(child.task)
                child.task = None

    def _hear(self, child: _Child) -> None:
        """Receive a child's word that it is ready, or the outcome of its task; replace it if it has ended."""
        try:
            message = child.pipe.recv_bytes()
        except (OSError, EOFError):
            self._replace(child)
            return
        task, child.task = child.task, None
        if task is None:
            child.starting, self._failed_starts = False, 0
            return
        try:
            result, failure = pickle.loads(message)
        except Exception as error:  # a result of a type that cannot be rebuilt
            task.future.set_exception(error)
            return
        if failure is None:
            task.future.set_result(result)
        else:
            raised, where = failure
            raised.__cause__ = ChildTraceback(where)
            task.future.set_exception(raised)

    def _replace(self, child: _Child) -> None:
        exit_code = self._forget(child)
        if child.task is not None:
            child.task.future.set_exception(ChildDied(exit_code))
        if child.starting:
            self._failed_starts += 1
            if self._failed_starts == FAILED_STARTS:
                raise ChildProcessError(f"{FAILED_STARTS} children in a row ended while they started")
        self._start()

    def _forget(self, child: _Child) -> int | None:
        """Wait for the end of a child; returns its exit code."""
        self._children.remove(child)
        self._pipes.unregister(child.pipe)
        child.pipe.close()
        child.process.join()
        return child.process.exitcode

    def _end(self, started: Future[None], error: BaseException | None) -> None:
        """Kill the children, and fail the tasks that are left, so that nobody waits for them."""
        with self._lock:
            self._ended = True
        tasks = [child.task for child in self._children if child.task is not None] + [*self._waiting]
        for child in self._children:
            child.process.kill()
        for child in [*self._children]:
            self._forget(child)
        self._pipes.close()
        os.close(self._wake)
        os.close(self._woken)
        futures = [task.future for task in tasks] + ([] if started.done() else [started])
        for future in futures:
            failure = self._start_error()
            failure.__cause__ = error
            future.set_exception(failure)

    def _start_error(self) -> ChildProcessError:
        return ChildProcessError(
            f"the child processes for {self.doing} cannot be started, or are killed while they start; check the "
            "machine's free memory and its limit on processes, and run the same command again to resume"
        )


def _work(pipe: Connection, initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    """What a child does."""
    exit_with_parent()
    for number in (signal.SIGINT, *SCHEDULER_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    initializer(*initargs)
    with suppress(EOFError, OSError):  # the parent has ended
        pipe.send_bytes(b"")
        while True:
            pipe.send_bytes(_outcome(pipe.recv_bytes()))


def _outcome(call: bytes) -> bytes:
    """The pickled result of a pickled call, and None; or None, and its error with the traceback."""
    try:
        function, args = pickle.loads(call)
        return bytes(ForkingPickler.dumps((function(*args), None)))
    except BaseException as error:  # the parent raises it
        return bytes(ForkingPickler.dumps((None, (sendable(error), traceback.format_exc()))))


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
