"""SIGINT and SIGTERM as requests: the first stops training at the next step, the second at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from egopatch.features.common.signals import signal_handlers

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal interrupted training; the file of each run group holds its position."""


@contextmanager
def stop_signals(second_raises: bool = True, on_first: Callable[[], object] | None = None) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set inside the block, so that no step is interrupted half-way.

    Outside of the main thread, which alone receives signals, the event is never set.

    Args:
        second_raises: Whether a second signal raises KeyboardInterrupt.
        on_first: Called at the first signal.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            if second_raises:
                raise KeyboardInterrupt
            return
        stopping.set()
        if on_first is not None:
            on_first()

    with signal_handlers(SIGNALS, handle):
        yield stopping
