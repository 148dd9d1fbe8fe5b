"""Child processes: what starting them needs, and what becomes of tasks whose child ends."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import synchronize
from pathlib import Path

import psutil
import pytest

from egopatch.extract.children.spawned import ChildDied, SpawnedPool, require_semaphores
from egopatch.features.common.child_errors import ChildError
from tests.extract.feed import acting
from tests.extract.job import wait_until


@pytest.fixture
def busy_process() -> Iterator[None]:
    """This process computes in other threads, so the pool's thread often waits for the GIL."""
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(20_000))

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    done.set()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("busy_process")
def test_a_child_that_ends_at_once_fails_only_its_task() -> None:
    with SpawnedPool("testing", 2, int) as pool:
        bad = [pool.schedule(os._exit, code) for code in (3, 0, 4)]
        good = [pool.schedule(abs, -number) for number in range(6)]
        exit_codes = [error.exit_code for future in bad if isinstance(error := future.exception(), ChildDied)]
        assert exit_codes == [3, 0, 4]
        assert [future.result() for future in good] == [*range(6)]


def test_a_child_that_is_killed_while_idle_is_replaced() -> None:
    with SpawnedPool("testing", 1, int) as pool:
        pid = pool.schedule(os.getpid).result()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid))
        assert pool.schedule(os.getpid).result() != pid


def test_children_that_fail_to_start_end_the_pool(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needed = tmp_path / "needed"
    needed.touch()
    with SpawnedPool("testing", 1, os.stat, needed) as pool:
        pid = pool.schedule(os.getpid).result()
        needed.unlink()
        with pytest.raises(ChildDied):
            pool.schedule(os.kill, pid, signal.SIGKILL).result()
        with pytest.raises(ChildProcessError, match="for testing cannot be started, or are killed while they start"):
            pool.schedule(os.getpid).result()
        with pytest.raises(ChildProcessError, match="for testing cannot be started"):
            pool.schedule(os.getpid)
    assert capfd.readouterr().err.count("FileNotFoundError") == 3
    with (
        SpawnedPool("testing", 2, os._exit, 1) as pool,
        pytest.raises(ChildProcessError, match="for testing cannot be started"),
    ):
        pool.schedule(os.getpid).result()


def test_errors_and_unpicklable_results_reach_the_caller() -> None:
    with SpawnedPool("testing", 1, int) as pool:
        error = pool.schedule(int, "x").exception()
        assert isinstance(error, ValueError)
        assert "function(*args)" in str(error.__cause__), "the child's traceback"
        foreign = pool.schedule(acting.fail_with_two_arguments).exception()
        assert isinstance(foreign, ChildError), "it cannot be rebuilt"
        assert str(foreign) == "TwoArguments: this and that"
        assert "pickle" in str(pool.schedule(threading.Lock).exception())
        with pytest.raises(TypeError, match="pickle"):
            pool.schedule(int, threading.Lock())
        assert pool.schedule(abs, -1).result() == 1


def test_closing_ends_children_and_fails_what_they_were_doing() -> None:
    before = multiprocessing.active_children()
    with SpawnedPool("testing", 1, int) as pool:
        futures = [pool.schedule(time.sleep, 60) for _ in range(2)]
    assert all(isinstance(future.exception(timeout=0), ChildProcessError) for future in futures)
    assert set(multiprocessing.active_children()) <= set(before)
    pool.close()


def test_an_interrupt_while_a_task_is_handed_over_does_not_stop_the_pool_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with SpawnedPool("testing", 1, int) as pool:
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.schedule(os.getpid)
        monkeypatch.undo()
        assert pool.schedule(abs, -1).result() == 1


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
        pytest.param(
            "egopatch.extract.engines.joblib_engine import call_in_workers as start; start(int, [()])",
            "encoding in wor",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_program_on_standard_input_is_the_cause_that_is_named(call: str, purpose: str) -> None:
    ended = subprocess.run([sys.executable, "-"], input=f"from {call}", capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    *traceback, line = ended.stderr.splitlines()
    assert line.startswith(f"ChildProcessError: {purpose}")
    assert "standard input (`python -`); save it to a file" in line
    assert "FileNotFoundError" not in "".join(traceback)  # of a child
