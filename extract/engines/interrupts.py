"""What a scheduler's signals do to a job: it stops cleanly and says that it wants to be started again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from egopatch.features.common.signals import signal_handlers, start_trackers

# sysexits.h EX_TEMPFAIL: "try again later". Schedulers can be told to requeue a job that ends with it.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requeue(BaseException):
    """The scheduler wants the machine back.

    A BaseException, so that `except Exception` does not treat it as a failure.
    """


@contextmanager
def requeue_on_signals() -> Iterator[None]:
    """As `raise_on_signals`, for a block that starts processes."""
    start_trackers()
    with raise_on_signals():
        yield


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise `Requeue`, once; the notices that follow are ignored."""

    def requeue(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Requeue(signal.Signals(number).name)

    with signal_handlers(SIGNALS, requeue):
        yield
