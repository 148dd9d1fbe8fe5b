"""Signal handlers and blocked signals for the length of a block, and what a scheduler's signals mean to a job."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from egopatch.interrupt import REQUEUE as REQUEUE
from egopatch.interrupt import SCHEDULER_SIGNALS as SCHEDULER_SIGNALS
from egopatch.interrupt import Requeue as Requeue
from egopatch.interrupt import interrupts_not_dropped, raise_requeue
from egopatch.interrupt import raise_dropped_requeue as raise_dropped_requeue


@contextmanager
def signal_handlers(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Within the block `handler` receives the signals `numbers`; afterwards the former handlers are back, except for
    signals to which the handler has given another one.

    SIGHUP stays ignored where it is: the job was started by `nohup`.

    Raises:
        ValueError: This is not the main thread, which alone receives signals.
    """
    before: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, former in before.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, former)


@contextmanager
def requeue_on_signals(program: str | None = None) -> Iterator[None]:
    """Within the block the first of SIGTERM, SIGUSR1 and SIGHUP raises `Requeue`; further ones are ignored for good.

    Args:
        program: Name of the program, which a signal during an import ends at once; None in a worker process.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise_requeue(number, frame, program)

    with signal_handlers(SCHEDULER_SIGNALS, handle), interrupts_not_dropped():
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold SIGINT and `SCHEDULER_SIGNALS` back from their handlers until the end of the block.

    A handler may raise between any two steps of the main thread. Within `queue.Queue.put`, that can leave a waiter
    behind, which takes the next wake-up from the thread that waits in `get`; joining that thread then takes forever.
    Outside of the main thread, which alone runs handlers, nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    try:
        with signal_handlers((signal.SIGINT, *SCHEDULER_SIGNALS), lambda received, _: arrived.append(received)):
            yield
    finally:
        for received in dict.fromkeys(arrived):
            signal.raise_signal(received)


def start_trackers() -> None:
    """Start the resource trackers, which clean up after killed children, before any child needs one.

    Otherwise they start with the first child: SIGUSR1 or SIGHUP then kills them, and they warn about resources of
    killed children although they free them. A process that is started while a signal is ignored ignores it too.
    """
    # Imported here, because joblib takes long to import and most commands start no workers.
    from joblib.externals.loky.backend import resource_tracker as loky_tracker

    numbers = (signal.SIGUSR1, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    warnings = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    try:
        resource_tracker.ensure_running()
        loky_tracker.ensure_running()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        del os.environ["PYTHONWARNINGS"]
        if warnings is not None:
            os.environ["PYTHONWARNINGS"] = warnings


@contextmanager
def blocked_in_children(*numbers: signal.Signals) -> Iterator[None]:
    """Processes and threads that start within the block do not receive the signals `numbers` until they unblock them.

    This thread receives them after the block. Terminals and schedulers signal all processes of a job, and a child that
    handled a signal only once it runs could be ended by it during its imports. Call `start_trackers` before: starting a
    tracker unblocks signals again.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
