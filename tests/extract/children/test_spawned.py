"""What starting child processes needs."""

import errno
import os
import subprocess
import sys
from multiprocessing import synchronize
from pathlib import Path

import pytest

from egopatch.extract.children.spawned import require_semaphores


def test_missing_semaphores_error_says_what_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    require_semaphores("a test")
    monkeypatch.setattr(synchronize.SemLock, "__init__", refuse)
    with pytest.raises(ChildProcessError) as caught:
        require_semaphores("decoding in child processes")
    assert str(caught.value).startswith(
        "/dev/shm: Read-only file system; decoding in child processes needs semaphores there, a few kB: mount it for w"
    )


STARTED = """
import multiprocessing
from egopatch.extract.children.spawned import SpawnedPool

if __name__ == "__main__":
    with SpawnedPool("testing", 2, int):
        print(len(multiprocessing.active_children()))
"""


def test_children_start_immediately_with_asserts_disabled(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STARTED)
    output = subprocess.run([sys.executable, "-O", script], capture_output=True, text=True, check=True).stdout
    assert output == "2\n"


@pytest.mark.parametrize(
    ("call", "purpose"),
    [
        ("egopatch.extract.children.spawned import SpawnedPool as start; start('decoding', 1, int)", "decoding in chi"),
        ("egopatch.extract.engines.joblib_engine import call_in_workers as start; start(int, [()])", "encoding in wor"),
    ],
)
def test_program_on_standard_input_is_the_cause_that_is_named(call: str, purpose: str) -> None:
    ended = subprocess.run([sys.executable, "-"], input=f"from {call}", capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    *traceback, line = ended.stderr.splitlines()
    assert line.startswith(f"ChildProcessError: {purpose}")
    assert "standard input (`python -`); save it to a file" in line
    assert "FileNotFoundError" not in "".join(traceback)  # of a child
