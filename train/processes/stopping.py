"""Signals as requests to stop: training ends after the current step, and the exit code says who sent the signal."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from egopatch.features.common.signals import REQUEUE, SCHEDULER_SIGNALS, raise_dropped_requeue, signal_handlers
from egopatch.interrupt import INTERRUPTED

SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)
# How a process pool stops its processes: terminals and schedulers signal all processes of a job, but not by this one.
FORWARDED = signal.SIGUSR2


class Stopped(Exception):
    """A signal interrupted training; the file of each run group holds its position.

    Attributes:
        code: Exit code of the command: `INTERRUPTED` after Ctrl-C, `REQUEUE` after a scheduler's signal.
    """

    code = INTERRUPTED


@contextmanager
def stop_signals(second_raises: bool = True, on_first: Callable[[], object] | None = None) -> Iterator[threading.Event]:
    """Yield an event that SIGINT and `SCHEDULER_SIGNALS` set inside the block, so that no step is interrupted half-way.

    A `Stopped` that leaves the block gets the exit code of the first signal. Outside of the main thread, which alone
    receives signals, the event is never set.

    Args:
        second_raises: Whether SIGINT as a later signal raises KeyboardInterrupt; schedulers repeat their own signals.
        on_first: Called at the first signal.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    code = INTERRUPTED

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal code
        if stopping.is_set():
            if second_raises and number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        code = REQUEUE if number in SCHEDULER_SIGNALS else INTERRUPTED
        stopping.set()
        if on_first is not None:
            on_first()

    raise_dropped_requeue()
    with signal_handlers((*SIGNALS, FORWARDED), handle):
        try:
            yield stopping
        except Stopped as stopped:
            stopped.code = code
            raise
