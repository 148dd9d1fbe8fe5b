"""What a scheduler's signals do to a job: it stops cleanly and says that it wants to be started again."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from joblib.externals.loky.backend import resource_tracker as loky_tracker

from egopatch.features.common.signals import signal_handlers

# sysexits.h EX_TEMPFAIL: "try again later". Schedulers can be told to requeue a job that ends with it.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requeue(BaseException):
    """The scheduler wants the machine back. No Exception, so that nothing takes it for a failure of the work."""


@contextmanager
def requeue_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise `Requeue`, once; the notices that follow are ignored."""
    start_trackers()

    def requeue(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Requeue(signal.Signals(number).name)

    with signal_handlers(SIGNALS, requeue):
        yield


def start_trackers() -> None:
    """Start the resource trackers, which clean up after killed children, before any child needs one.

    Otherwise they start with the first child: SIGUSR1 then kills them, and they warn about resources of killed children
    although they free them. A process that is started while a signal is ignored ignores it too.
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
