"""Signals that arrive within a block reach their handlers at its end, and those in a destructor at once after it."""

import signal
import threading
import time
from importlib import import_module
from pathlib import Path
from types import FrameType

import pytest

from egopatch.features.common.signals import Requeue, requeue_on_signals, signal_handlers, signals_held
from egopatch.interrupt import interrupts_not_dropped


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


class Signalling:
    """An object whose destructor is interrupted."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def destroy(signalling: Signalling) -> None:
    del signalling
    time.sleep(5)


def test_an_interrupt_in_a_destructor_is_raised_after_it() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_not_dropped():
        destroy(Signalling(signal.SIGINT))
    with pytest.raises(Requeue, match="SIGTERM"), requeue_on_signals():
        destroy(Signalling(signal.SIGTERM))


def test_a_signal_in_an_import_is_raised_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_slowly.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)

    def work() -> None:
        assert import_module("imported_slowly").whole
        time.sleep(5)

    with pytest.raises(Requeue, match="SIGTERM"), requeue_on_signals():
        work()


def test_other_errors_in_a_destructor_are_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError

    reported: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))
    with interrupts_not_dropped():
        Failing()
    assert reported == [ValueError]
