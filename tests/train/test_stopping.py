"""Signals as requests to stop."""

import signal

import pytest

from egopatch.train.processes.stopping import SIGNALS, stop_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    called: list[bool] = []
    with stop_signals(on_first=lambda: called.append(True)) as stopping:
        assert not stopping.is_set()
        signal.raise_signal(number)
        assert stopping.is_set()
    assert called == [True]


def test_the_second_signal_stops_at_once_only_where_it_may() -> None:
    with stop_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    with stop_signals(second_raises=False) as stopping:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stopping.is_set()
