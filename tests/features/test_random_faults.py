"""A twentieth of `benchmarks/random_faults.py`, with seeds of its own."""

import pytest

from benchmarks.random_faults import EVENTS, run_rounds


@pytest.mark.slow
@pytest.mark.usefixtures("in_memory")
def test_nothing_committed_is_lost_and_nothing_lost_goes_unnoticed() -> None:
    events, failed = run_rounds(10_000, 25)
    assert not failed  # pytest shows what was printed
    assert set(events) == set(EVENTS)
