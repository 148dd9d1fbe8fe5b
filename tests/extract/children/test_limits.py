"""What a decoder child may use."""

import resource

import pytest

from egopatch.extract.children import limits


@pytest.mark.parametrize(("hard", "lowered"), [(resource.RLIM_INFINITY, True), (1 << 60, True), (1 << 20, False)])
def test_lower_memory_limit_of_a_scheduler_is_kept(hard: int, lowered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without privileges that raises its hard limit gets an error."""
    requested: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: requested.append(limit))
    monkeypatch.setattr(limits.signal, "signal", lambda *_: None)
    limits.prepare_child(memory_gb=4)
    assert len(requested) == lowered
    assert all(most > 8 * limits.GIB for limit in requested for most in limit)
