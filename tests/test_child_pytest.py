"""A pytest process that a test starts does not inherit the environment of pytest-xdist."""

from pathlib import Path

import pytest

from tests.child_pytest import run_pytest

INNER = """
import os

def test_alone(request):
    assert not [name for name in os.environ if name.startswith("PYTEST_XDIST_")]
    assert request.config.pluginmanager.is_blocked("benchmark")
    assert os.environ["OF_THE_CHILD"] == "1"
"""


def test_child_pytest_does_not_inherit_the_xdist_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORKER", "WORKER_COUNT", "TESTRUNUID"):
        monkeypatch.setenv(f"PYTEST_XDIST_{name}", "1")
    (tmp_path / "test_inner.py").write_text(INNER)
    result = run_pytest(str(tmp_path), OF_THE_CHILD="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout
