"""Signals that arrive within a block reach their handlers at its end."""

import signal
import threading
from types import FrameType

import pytest

from egopatch.features.common.signals import signal_handlers, signals_held


def test_a_held_signal_is_handled_once_after_the_block() -> None:
    events: list[object] = []

    def handle(number: int, _: FrameType | None) -> None:
        events.append(number)

    with signal_handlers([signal.SIGUSR1], handle):
        with signals_held():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            events.append("end")
        assert signal.getsignal(signal.SIGUSR1) is handle
    assert events == ["end", signal.SIGUSR1]


def interrupted_and_failed() -> None:
    with signals_held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError


def test_a_held_interrupt_is_raised_even_if_the_block_raises() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted_and_failed()
    assert isinstance(caught.value.__context__, ValueError)


def test_signals_are_not_held_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with signals_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
