"""Ctrl-C while a program still imports its modules: one line and the exit code of an interrupt, not a traceback.

It imports nothing of the package, so that it is there before the first import that takes time.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code of a command that a signal interrupted


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
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(exit_code_of_interrupt()) from None
