"""Runs calls in parallel on the cores of a CPU, each in a forked process."""

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

import torch

from egopatch.features.common.child_errors import ChildTraceback, sendable
from egopatch.features.common.parent import exit_with_parent
from egopatch.train.processes.stopping import FORWARDED, SIGNALS, Stopped, stop_signals

Result = TypeVar("Result")


class ProcessLost(ChildProcessError):
    """A forked process was killed; the message names its exit status."""


def can_fork() -> bool:
    """Whether forked processes may train, as one of them finds out.

    torch refuses backward passes after a fork once it has started threads for other devices: with an accelerator, and
    without one if a CUDA build has compiled a function in this process.
    """
    if torch.accelerator.is_available():
        return False
    try:
        call_in_processes([_pass_backward], cores=1)
    except RuntimeError:
        return False
    return True


def _pass_backward() -> None:
    torch.zeros((), requires_grad=True).square().backward()


def call_in_processes(calls: Sequence[Callable[[], Result]], cores: int) -> list[Result]:
    """Results of `calls`, in order. Each call runs in a forked process of its own, on one thread.

    The operations of a light head are too small to split over threads, and threads that each run many of them wait for
    the GIL. Forked processes do neither, and share memory copy-on-write.

    The first signal of `stop_signals` reaches each process once, as `FORWARDED`, whoever else got it. It raises
    KeyboardInterrupt there, so a call can choose where to stop. Ctrl-C as a later signal kills the processes.

    Args:
        calls: Their results and exceptions are pickled; the calls themselves are not. An exception that cannot be
            pickled arrives as a `ChildError`.
        cores: Number of processes at once.

    Raises:
        ProcessLost: A process was killed.
        Stopped: After a signal, once the processes have stopped.
        KeyboardInterrupt: After Ctrl-C as a second signal.
        BaseException: The exception of the first call to fail, once the other processes have stopped.
    """
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    signalled: set[ForkProcess] = set()
    results: dict[int, Result] = {}
    failures: list[BaseException] = []
    waiting = list(enumerate(calls))

    def terminate_all() -> None:
        for _, process in running.values():
            if process not in signalled and process.is_alive() and process.pid:
                signalled.add(process)
                os.kill(process.pid, FORWARDED)

    try:
        with stop_signals(on_first=terminate_all) as stopping:
            while running or waiting:
                if failures or stopping.is_set():
                    waiting.clear()
                    terminate_all()  # also a process that was started just as the signal came
                elif waiting and len(running) < cores:
                    number, call = waiting.pop(0)
                    connection, process = _start(call)
                    running[connection] = number, process
                    continue
                # Without a process, this would wait forever.
                for ready in wait(list(running)) if running else ():
                    assert isinstance(ready, Connection)
                    number, process = running.pop(ready)
                    try:
                        results[number] = _receive(ready, process)
                    except BaseException as error:
                        failures.append(error)
            if stopping.is_set() and all(isinstance(error, Stopped | KeyboardInterrupt) for error in failures):
                stops = [error for error in failures if isinstance(error, Stopped)]
                raise stops[0] if stops else Stopped("interrupted; run the same command again to resume")
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(calls))]


def _start(call: Callable[[], object]) -> tuple[Connection, ForkProcess]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(call, sender), daemon=True)
    # No signal reaches the new process before it has handlers of its own.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, FORWARDED))
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads: torch's threads are idle, and the fork does not use them.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()
    return receiver, process


def _run(call: Callable[[], object], connection: Connection) -> None:
    # The others stay blocked: they may be sent to all processes, and the parent passes them on.
    signal.signal(FORWARDED, signal.default_int_handler)
    exit_with_parent()
    torch.set_num_threads(1)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {FORWARDED})  # raises if the signal has come already
        connection.send((call(), None))
    except BaseException as error:  # also KeyboardInterrupt: the parent raises it
        connection.send((None, (sendable(error), "".join(traceback.format_exception(error)))))


def _receive(connection: Connection, process: ForkProcess) -> Any:
    """The result of a process that has sent one or has ended; raises the exception that the process raised."""
    try:
        result, failure = connection.recv()
    except EOFError:
        result, failure = None, None
    connection.close()
    process.join()
    if process.exitcode:
        how = f"by signal {-process.exitcode}" if process.exitcode < 0 else f"with exit code {process.exitcode}"
        if process.exitcode == -signal.SIGKILL:
            how += " (the system also sends it when memory runs out; then set OMP_NUM_THREADS=1)"
        raise ProcessLost(f"process {process.pid} ended {how}; run the same command again to resume")
    if failure is not None:
        error, where = failure
        raise error from ChildTraceback(where)
    return result
