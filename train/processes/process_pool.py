"""Calls side by side on the cores of a CPU: a forked process for each."""

import multiprocessing
import signal
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

import torch

from egopatch.features.common.parent import exit_with_parent
from egopatch.train.processes.stopping import SIGNALS, stop_signals

Result = TypeVar("Result")


class ForkLost(ChildProcessError):
    """A fork was killed; the message says how it ended."""


def can_fork() -> bool:
    """Whether forks may train: beside an accelerator torch refuses backward passes in the fork of one that made any."""
    return not torch.accelerator.is_available()


def call_in_forks(calls: Sequence[Callable[[], Result]], cores: int) -> list[Result]:
    """What each call returns, in order; each runs in a process of its own that computes on one thread.

    A light head's operations are too small to be cut, and threads that run many of them wait for one another at
    Python's lock. Forks do neither, and see what memory holds without a copy.

    SIGINT and SIGTERM reach the forks as one SIGTERM, so that a call can stop where it likes; a second signal kills.

    Args:
        calls: what they return or raise is pickled.
        cores: forks at once.

    Raises:
        ForkLost: a fork was killed.
        KeyboardInterrupt: by a second signal, or by one that nothing else was raised for.
        BaseException: what the first call to fail raised, once the others have stopped.
    """
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    told: set[ForkProcess] = set()
    results: dict[int, Result] = {}
    failures: list[BaseException] = []
    waiting = list(enumerate(calls))

    def stop() -> None:
        for _, process in running.values():
            if process not in told:
                told.add(process)
                process.terminate()

    try:
        with stop_signals(tell=stop) as asked:
            while running or waiting:
                while waiting and len(running) < cores:
                    number, call = waiting.pop(0)
                    connection, process = _start(call)
                    running[connection] = number, process
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    number, process = running.pop(ready)
                    try:
                        results[number] = _receive(ready, process)
                    except BaseException as error:
                        failures.append(error)
                if failures or asked.is_set():
                    waiting.clear()
                    stop()  # also those that were started just as a signal came
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    if failures:
        raise failures[0]
    if len(results) < len(calls):
        raise KeyboardInterrupt
    return [results[number] for number in range(len(calls))]


def _start(call: Callable[[], object]) -> tuple[Connection, ForkProcess]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(call, theirs), daemon=True)
    # No signal reaches the fork before it has handlers of its own.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside any thread: torch's are idle now, and the fork does not use them.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def _run(call: Callable[[], object], connection: Connection) -> None:
    # SIGINT stays blocked: a terminal sends it to all processes, and it is the parent's to pass on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    exit_with_parent()
    torch.set_num_threads(1)
    try:
        connection.send((call(), None))
    except BaseException as error:  # of signals as well: the parent raises it
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
        raise ForkLost(
            f"process {process.pid} ended {how} (9 is also what the system sends where memory runs out; then set "
            "OMP_NUM_THREADS=1); give the same command again to go on"
        )
    if failure is not None:
        raise failure
    return result
