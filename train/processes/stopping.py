"""Signals that ask for an end: the first one politely, the second at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal asked the training to stop; each crew's file holds its place."""


@contextmanager
def stop_signals(insist: bool = True, tell: Callable[[], object] | None = None) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set inside the block, so that nothing is cut in two.

    In another thread than the main one, which gets no signals, it is never set.

    Args:
        insist: whether a second signal raises KeyboardInterrupt.
        tell: called at the first signal.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            if insist:
                raise KeyboardInterrupt
            return
        asked.set()
        if tell is not None:
            tell()

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
