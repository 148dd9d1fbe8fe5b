"""How the tests are shared among the processes of pytest-xdist."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file in one process; files that need the full-size networks, 1.6 GB of tensors, share a process."""
    for item in items:
        full_size = isinstance(item, pytest.Function) and hasattr(item.module, "formula_checkpoint")
        item.add_marker(pytest.mark.xdist_group("full-size networks" if full_size else str(item.path)))
