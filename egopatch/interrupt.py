"""Handles Ctrl-C while a program imports its modules: one line and the exit code of an interrupt, not a traceback.

It imports nothing from the package, so that it is ready before the first slow import. Python 3.8 can read it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code of a command that a signal interrupted
PROGRAMS = ("egopatch", "extract", "features", "train")


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
    """Let Ctrl-C within the block end `program` in one line.

    Raises:
        SystemExit: The user interrupted the block; the exit code is `INTERRUPTED`.
    """
    ends_at_once = signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    try:
        if ends_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(exit_code_of_interrupt()) from None
    finally:
        if ends_at_once:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
