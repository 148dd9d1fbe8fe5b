"""Work side by side on the cores of a CPU: a forked process for each piece."""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

from extract.orphans import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


# Passed on to the forks.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProcessLost(ChildProcessError):
    """A forked process was killed; the message says how it ended."""


class SideBySide(Generic[Item, Result]):
    """Calls of `work` in at most `cores` processes at once, on one thread each.

    A light head's operations are too small to be cut, and threads that run many of them wait for one another at
    Python's lock. Forked processes do neither, and see what memory holds without a copy. On a machine with a GPU torch
    refuses a backward pass in a fork of a process that has made one itself.

    SIGINT and SIGTERM are passed on as SIGTERM, once, so that `work` can stop where it likes; a second signal kills.

    Args:
        work: runs in the fork; its result, or what it raises, is pickled.
        cores: processes at once.
    """

    def __init__(self, work: Callable[[Item], Result], cores: int) -> None:
        self._work, self._cores = work, cores
        self._running: dict[Connection, tuple[int, ForkProcess]] = {}

    def map(self, items: Sequence[Item]) -> list[Result]:
        """`work` of each item, in order.

        Raises:
            ProcessLost: a fork was killed.
            KeyboardInterrupt: a signal came, and nothing raised anything for it.
            BaseException: what the first call to fail raised, once the others have stopped.
        """
        results: dict[int, Result] = {}
        failures: list[BaseException] = []
        waiting = list(enumerate(items))
        with self._signals() as asked:
            while self._running or (waiting and not failures and not asked.is_set()):
                while waiting and len(self._running) < self._cores and not failures and not asked.is_set():
                    self._start(*waiting.pop(0))
                for connection in wait(list(self._running)):
                    assert isinstance(connection, Connection)
                    number, process = self._running.pop(connection)
                    try:
                        results[number] = _receive(connection, process)
                    except BaseException as error:
                        failures.append(error)
                        self._stop()
        if failures:
            raise failures[0]
        if len(results) < len(items):
            raise KeyboardInterrupt
        return [results[number] for number in range(len(items))]

    def _start(self, number: int, item: Item) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(self._work, item, theirs), daemon=True)
        # None is lost between the fork and its entry here, and none reaches the fork before it is ready.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process.start()
            self._running[ours] = number, process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        theirs.close()

    def _stop(self) -> None:
        for _, process in self._running.values():
            process.terminate()

    @contextmanager
    def _signals(self) -> Iterator[threading.Event]:
        """An event that is set by the first signal, which is passed on."""
        asked = threading.Event()
        if threading.current_thread() is not threading.main_thread():
            yield asked
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if asked.is_set():
                for _, process in self._running.values():
                    process.kill()
                raise KeyboardInterrupt
            asked.set()
            self._stop()

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _run(work: Callable[[Item], Result], item: Item, connection: Connection) -> None:
    # SIGINT stays blocked: a terminal sends it to all processes, and it is the parent's to pass on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        connection.send((work(item), None))
    except BaseException as error:  # Stopped by a signal as well: the parent raises it
        connection.send((None, error))


def _receive(connection: Connection, process: ForkProcess) -> Any:
    """The result of a fork that has one or is gone; raises what it raised."""
    try:
        result, failure = connection.recv()
    except EOFError:
        result, failure = None, None
    connection.close()
    process.join()
    if process.exitcode:
        how = f"by signal {-process.exitcode}" if process.exitcode < 0 else f"with exit code {process.exitcode}"
        raise ProcessLost(f"process {process.pid} ended {how}; give the same command again to go on")
    if failure is not None:
        raise failure
    return result
