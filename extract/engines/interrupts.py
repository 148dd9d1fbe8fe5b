"""What a scheduler's signals do to a job: it stops cleanly and says that it wants to be started again."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from joblib.externals.loky.backend import resource_tracker as loky_tracker

# sysexits.h EX_TEMPFAIL: "try again later". Schedulers can be told to requeue a job that ends with it.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requeue(BaseException):
    """The scheduler wants the machine back. No Exception, so that nothing takes it for a failure of the work."""


@contextmanager
def requeue_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise `Requeue`, once; the notices that follow are ignored."""
    start_trackers()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Requeue(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_trackers() -> None:
    """Start the processes that clear up what killed children leave behind, before any child needs one.

    They would be started by the way, but then die of SIGUSR1, and warn of what killed children left although they
    clear it up. A process that is started while a signal is ignored ignores it too.
    """
    handler, warnings = signal.signal(signal.SIGUSR1, signal.SIG_IGN), os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    try:
        resource_tracker.ensure_running()
        loky_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGUSR1, handler)
        del os.environ["PYTHONWARNINGS"]
        if warnings is not None:
            os.environ["PYTHONWARNINGS"] = warnings
