"""Ctrl-C while a program still imports its modules: one line and the exit code of an interrupt, not a traceback.

It imports nothing of the package, so that it is there before the first import that takes time. Python 3.8 can read it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code of a command that a signal interrupted
PROGRAMS = ("egopatch", "extract", "features", "train")


def end_on_interrupt() -> None:
    """Let Ctrl-C silently end this process until `interrupts_in_one_line`, if it is one of `PROGRAMS`.

    A process that only imports the package keeps its handlers.
    """
    name = "".join(sys.argv[:1])  # `-m` as long as Python looks for the module that it is to run
    started = sys.orig_argv[-len(sys.argv)] in PROGRAMS if name == "-m" else name.endswith("/egopatch")
    if started and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def exit_code_of_interrupt() -> int:
    """`INTERRUPTED`, for a program that has caught a KeyboardInterrupt and ends now.

    Python keeps a mark of an interrupt that left the execution of a string, in which imports spend much of their time,
    since dataclasses are made so. It then ends by the signal, whatever the exit code; executing another string removes
    the mark.
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
