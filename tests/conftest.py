"""What holds for all tests: they hear Ctrl-C, large networks do not stay in memory, and a GPU's do not skip unseen."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from egopatch.features.common.machine import request_huge_pages

if TYPE_CHECKING:
    import torch


def pytest_configure() -> None:
    """Undo what a shell does to a job in the background, which ignores Ctrl-C, and whose children do so too.

    Before any test imports torch, do what the commands do.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request_huge_pages()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Free the full-size networks, 1.6 GB of tensors, after the last test in a row that needs them."""
    if _is_full_size(item) and not _is_full_size(nextitem):
        from tests.extract.encoders.networks import forget_full_size

        forget_full_size()


def _is_full_size(item: pytest.Item | None) -> bool:
    return isinstance(item, pytest.Function) and hasattr(item.module, "formula_checkpoint")


@pytest.fixture(autouse=True)
def torch_threads_stay() -> Iterator[None]:
    """What a test computes on is not what all later ones do: two processes of two threads each slow it tenfold."""
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    yield
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def signal_handlers_stay() -> Iterator[None]:
    """After a scheduler's signal a program ignores further ones until it ends."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def closing_terminal() -> Iterator[None]:
    """A closing terminal reaches the test and its children, as it does unless `nohup` started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def cuda() -> "torch.device":
    """The CUDA device; skips where there is none, or fails there when FAIL_WITHOUT_CUDA=1."""
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail("FAIL_WITHOUT_CUDA=1 and torch.cuda.is_available() is false")
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """The CPU, as a stand-in that runs the same code, and the CUDA device."""
    import torch

    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda")
