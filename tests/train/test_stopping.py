"""Signals as requests to stop."""

import signal
from contextlib import suppress

import pytest

from egopatch.features.common.signals import REQUEUE, Requeue, requeue_on_signals
from egopatch.interrupt import INTERRUPTED
from egopatch.train.processes.stopping import SIGNALS, Stopped, stop_signals

pytestmark = pytest.mark.usefixtures("closing_terminal")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_requests_a_stop(number: signal.Signals) -> None:
    called: list[bool] = []
    with stop_signals(on_first=lambda: called.append(True)) as stopping:
        assert not stopping.is_set()
        signal.raise_signal(number)
        assert stopping.is_set()
    assert called == [True]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_decides_the_exit_code(number: signal.Signals) -> None:
    """Not that of a forked process, which gets another signal than its parent."""

    def train() -> None:
        with stop_signals():
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            with stop_signals():
                signal.raise_signal(signal.SIGUSR1)
                raise Stopped

    with pytest.raises(Stopped) as stopped:
        train()
    assert stopped.value.code == (INTERRUPTED if number == signal.SIGINT else REQUEUE)


def test_a_signal_that_a_library_dropped_before_stops_the_training() -> None:
    with requeue_on_signals():
        with suppress(Requeue):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Requeue), stop_signals():
            pytest.fail("the signal was forgotten")


def test_only_a_second_ctrl_c_stops_at_once() -> None:
    with stop_signals() as stopping:
        for number in (*SIGNALS[1:], *SIGNALS[1:]):
            signal.raise_signal(number)
        assert stopping.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with stop_signals(second_raises=False) as stopping:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stopping.is_set()
