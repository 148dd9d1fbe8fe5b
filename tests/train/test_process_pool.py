"""Forked processes side by side: order, failures, kills and signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import psutil
import pytest
import torch

from egopatch.features.common.child_errors import ChildError
from egopatch.train.processes import process_pool
from egopatch.train.processes.process_pool import ProcessLost, call_in_processes, can_fork
from egopatch.train.processes.stopping import FORWARDED, SIGNALS, Stopped
from tests.features.faults import Picky

LONG_S = 60.0


def test_results_keep_their_order_and_each_process_uses_one_thread() -> None:
    before = torch.get_num_threads()
    tensor = torch.arange(5)
    last, started = os.pipe()

    def work(number: int) -> tuple[int, int, int]:
        if number == 4:
            os.write(started, b".")
        if number == 0:
            os.read(last, 1)  # the first to start ends after the last has started
        return int(tensor[number]), os.getpid(), torch.get_num_threads()

    results = call_in_processes([partial(work, number) for number in range(5)], cores=2)
    assert [number for number, _, _ in results] == [0, 1, 2, 3, 4]
    assert len({os.getpid(), *(process for _, process, _ in results)}) == 6
    assert {threads for _, _, threads in results} == {1}
    assert torch.get_num_threads() == before


def test_a_process_that_cannot_train_in_forked_ones_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    assert not can_fork()


@pytest.mark.slow
def test_forked_processes_train_if_can_fork_says_so_also_after_a_compilation() -> None:
    """Whether they do depends on torch: its CPU builds train in them, its CUDA builds refuse."""
    program = """if True:
        import torch
        from egopatch.train.processes.process_pool import call_in_processes, can_fork

        def train():
            torch.ones(3, requires_grad=True).sum().backward()

        torch.compile(lambda x: x.sin().sum(), backend="aot_eager")(torch.ones(3, requires_grad=True)).backward()
        if can_fork():
            call_in_processes([train], cores=1)
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_at_most_one_process_per_core_runs_at_once() -> None:
    def work() -> tuple[float, float]:
        started = time.monotonic()
        time.sleep(0.1)
        return started, time.monotonic()

    spans = call_in_processes([work] * 5, cores=2)
    for start, _ in spans:
        assert sum(other <= start < end for other, end in spans) <= 2


def test_an_unpicklable_error_is_reported_as_text() -> None:
    def work() -> None:
        raise Picky(3, "no such group")

    with pytest.raises(ChildError, match="Picky: error 3: no such group"):
        call_in_processes([work], cores=1)


def test_a_failure_stops_the_others_and_is_raised() -> None:
    def work(number: int) -> None:
        if number == 1:
            raise ValueError("no such group")
        time.sleep(LONG_S)

    started = time.monotonic()
    with pytest.raises(ValueError, match="no such group"):
        call_in_processes([partial(work, number) for number in range(9)], cores=2)
    assert time.monotonic() - started < LONG_S / 2


@pytest.mark.parametrize(
    ("number", "found"), [(signal.SIGKILL, r"signal 9 \(the system also sends it .*\)"), (signal.SIGALRM, "signal 14")]
)
def test_a_killed_process_is_named(number: signal.Signals, found: str) -> None:
    def work() -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(ProcessLost, match=f"ended by {found}; run the same command again to resume"):
        call_in_processes([work], cores=1)


@pytest.mark.usefixtures("closing_terminal")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_all_processes_interrupts_each_once(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    reached, report = os.pipe()
    others = set(psutil.Process().children())  # such as Python's resource tracker

    def work() -> None:
        try:
            os.write(report, b".")
            time.sleep(LONG_S)
        finally:
            time.sleep(0.2)  # as training that saves its position
            os.write(report, b"s")

    def interrupt() -> None:
        for _ in range(2):
            os.read(reached, 1)
        for process in [*set(psutil.Process().children()) - others, psutil.Process()]:
            process.send_signal(number)

    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(Stopped, match="run the same command again to resume"):
        call_in_processes([work] * 4, cores=2)
    assert time.monotonic() - started < LONG_S / 2
    assert signal.getsignal(number) is handler
    assert os.read(reached, 9) == b"ss"


def test_a_signal_is_not_lost_if_the_last_call_still_succeeds() -> None:
    reached, report = os.pipe()

    def work() -> None:
        stopping = threading.Event()
        signal.signal(FORWARDED, lambda *_: stopping.set())  # as in training, which ends its step
        os.write(report, b".")
        stopping.wait(LONG_S)

    def interrupt() -> None:
        os.read(reached, 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Stopped, match="run the same command again to resume"):
        call_in_processes([work], cores=1)


def test_a_signal_just_as_a_process_starts_stops_it_and_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = process_pool._start, []

    def interrupted(call: Callable[[], object]) -> object:
        started.append(start(call))
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(process_pool, "_start", interrupted)
    before = time.monotonic()
    with pytest.raises(Stopped, match="run the same command again to resume"):
        call_in_processes([partial(time.sleep, LONG_S)] * 4, cores=2)
    assert time.monotonic() - before < LONG_S / 2
    assert len(started) == 1


def test_a_signal_before_a_process_has_begun_its_call_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: time.sleep(0.5))  # while the new process prepares itself
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(Stopped, match="run the same command again to resume"):
        call_in_processes([partial(time.sleep, LONG_S)], cores=1)
