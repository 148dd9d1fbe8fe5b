"""What holds for all tests: they hear Ctrl-C, and they are shared among the processes of pytest-xdist by files."""

import signal

import pytest


def pytest_configure() -> None:
    """Undo what a shell does to a job in the background, which ignores Ctrl-C, and whose children do so too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file in one process; files that need the full-size networks, 1.6 GB of tensors, share a process."""
    for item in items:
        full_size = isinstance(item, pytest.Function) and hasattr(item.module, "formula_checkpoint")
        item.add_marker(pytest.mark.xdist_group("full-size networks" if full_size else str(item.path)))
