"""Ctrl-C and a scheduler's signals, from a program's first import to its end: one line and an exit code, no traceback.

A scheduler's signals matter to the jobs that it starts. On a shared file system, imports may take half a minute.

It imports nothing from the package, so that it is ready before the first slow import. Python 3.8 can read it.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit code of a command that a signal interrupted
# sysexits.h EX_TEMPFAIL: "try again later". Schedulers can be told to requeue a job that ends with it.
REQUEUE = 75
# The last one comes when the terminal of a job closes, or its connection to a server breaks.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PROGRAMS = ("egopatch", "extract", "features", "train")
# Program -> the commands that schedulers start, and start again.
JOBS = {"extract": ("run", "retry", "videos"), "train": ("fit", "sweep")}


class Requeue(BaseException):
    """The scheduler wants the machine back; the argument is the name of its signal.

    A BaseException, so that `except Exception` does not treat it as a failure.
    """


def raise_requeue(number: int, frame: FrameType | None, program: str | None = None) -> None:
    """Handler of `SCHEDULER_SIGNALS`, for the first: further ones are ignored, because the process ends now.

    Args:
        number: The signal.
        frame: What it interrupts.
        program: Name of the program, which ends at once if that is an import. Without a name, `Requeue` is raised after
            the import.
    """
    if _importing(frame):
        if program is not None:
            _end_at_once(program, number)
        _thread.start_new_thread(_signal_soon, (_thread.get_ident(), number))
        return
    for each in SCHEDULER_SIGNALS:
        signal.signal(each, ignore_repeated)
    raise Requeue(signal.Signals(number).name)


def ignore_repeated(_: int, __: object) -> None:
    """Handler of `SCHEDULER_SIGNALS` after `raise_requeue`."""


def raise_dropped_requeue() -> None:
    """Raise `Requeue` again if it was raised before, and dropped: compiled libraries discard errors in some places."""
    if signal.getsignal(signal.SIGTERM) is ignore_repeated:
        raise Requeue("a signal")


def _importing(frame: FrameType | None) -> bool:
    """Whether `frame` is within an import, where an exception may be dropped, or leave a module half imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _end_at_once(program: str, number: int) -> None:
    """End the process as after an interrupt. An import holds nothing that an interrupted job must release."""
    interrupted = number == signal.SIGINT
    report_interrupt(program, None if interrupted else signal.Signals(number).name)
    os._exit(INTERRUPTED if interrupted else REQUEUE)


def report_interrupt(program: str, notice: object = None) -> None:
    """Print the line with which `program` ends after Ctrl-C, or after a scheduler's signal, which is the notice."""
    by = "" if notice is None else f" by {notice}"
    print(f"{program}: interrupted{by}; run the same command again to resume", file=sys.stderr, flush=True)


@contextmanager
def interrupts_not_dropped() -> Iterator[None]:
    """Within the block, an interrupt that arrives in a destructor or a callback is raised once that has ended.

    Nothing can be raised there: Python would print the exception and continue. Imports run many destructors: of 40
    signals to jobs that were starting, two were lost.
    """
    before = sys.unraisablehook

    def raise_later(unraisable: sys.UnraisableHookArgs) -> None:
        interrupt = unraisable.exc_value
        if isinstance(interrupt, KeyboardInterrupt):
            _thread.start_new_thread(_signal_soon, (_thread.get_ident(), signal.SIGINT))
        elif isinstance(interrupt, Requeue):
            number = signal.Signals.__members__.get(interrupt.args[0], signal.SIGTERM)
            signal.signal(number, raise_requeue)
            _thread.start_new_thread(_signal_soon, (_thread.get_ident(), number))
        else:
            before(unraisable)

    sys.unraisablehook = raise_later
    try:
        yield
    finally:
        sys.unraisablehook = before


def _signal_soon(thread: int, number: int) -> None:
    time.sleep(0.01)
    signal.pthread_kill(thread, number)


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process silently until `interrupts_in_one_line` runs, if it is one of `PROGRAMS`.

    A process that only imports the package keeps its handlers.
    """
    name = "".join(sys.argv[:1])  # `-m` while Python is still looking for the module to run
    started = sys.orig_argv[-len(sys.argv)] in PROGRAMS if name == "-m" else name.endswith("/egopatch")
    if started and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def exit_code_of_interrupt() -> int:
    """`INTERRUPTED`, for a program that has caught a KeyboardInterrupt and ends now.

    If an interrupt ends the execution of a string, Python sets a flag, and then ends by the signal, whatever the exit
    code. Imports spend much of their time there, since dataclasses execute strings. Executing another string clears
    the flag.
    """
    exec("")
    return INTERRUPTED


@contextmanager
def interrupts_in_one_line(program: str) -> Iterator[None]:
    """Let Ctrl-C within the block end `program` in one line, and a scheduler's signal likewise if it runs a job.

    Raises:
        SystemExit: A signal interrupted the block; the exit code is `INTERRUPTED`, or `REQUEUE` for a scheduler's.
    """
    numbers = (signal.SIGINT, *(SCHEDULER_SIGNALS if _runs_job(program) else ()))
    # Other handlers stay; `nohup`, for instance, has SIGHUP ignored.
    ending = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    is_last = True  # what the program does: it ends by an exception, such as SystemExit

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            raise_requeue(number, frame, program)
        elif _importing(frame):
            _end_at_once(program, number)
        raise KeyboardInterrupt

    try:
        for number in ending:
            signal.signal(number, handle)
        with interrupts_not_dropped():
            yield
        is_last = False
    except KeyboardInterrupt:
        report_interrupt(program)
        raise SystemExit(exit_code_of_interrupt()) from None
    except Requeue as notice:
        report_interrupt(program, notice)
        raise SystemExit(REQUEUE) from None
    finally:
        for number in ending:
            # While the program ends, a scheduler's signal would replace its exit code.
            ignored = is_last and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)


def _runs_job(program: str) -> bool:
    """Whether this process was started as `program` with one of `JOBS`; a child process has another command line."""
    args = sys.argv[1:] if program == "egopatch" else [program, *sys.argv[1:]]
    started = sys.orig_argv[-len(sys.argv[1:]) :] == sys.argv[1:]
    return started and len(args) > 1 and args[1] in JOBS.get(args[0], ())
