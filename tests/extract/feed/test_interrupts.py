"""Signals while children import what they need: the children print nothing, and the parent decides what happens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from egopatch.extract.engines.joblib_engine import ENDING_S
from tests.extract.job import wait_until

DECODERS = """
with DecodePool(VideoConfig(), 2, str) as pool:
    list(pool.map([Clip("a", Path("a")), Clip("b", Path("b"))]))
"""
WORKERS = "call_in_workers(str, [(0,), (1,)])"
SCRIPT = """
import sys
from pathlib import Path
from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.engines.joblib_engine import call_in_workers
from egopatch.extract.feed.pool import DecodePool
if __name__ == "__main__":
    try:
        {work}
    except KeyboardInterrupt:
        sys.exit(130)
"""
ENDLESS_IMPORT = """
import sys
from pathlib import Path
folder = Path(__file__).parent
if any(arg == "--multiprocessing-fork" or arg.endswith("popen_loky_posix") for arg in sys.orig_argv):
    with (folder / "importing").open("wb", buffering=0) as pipe:
        pipe.write(b"x")
    (folder / "never").open("rb").read()  # nobody opens it for writing
"""


def start(script: Path) -> "subprocess.Popen[str]":
    """Run a program, whose children find `sitecustomize.py` beside it."""
    environment = os.environ | {"PYTHONPATH": str(script.parent)}
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("work", [DECODERS, WORKERS], ids=["decoders", "workers"])
def test_children_interrupted_while_importing_print_nothing(work: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(work=work.strip().replace("\n", "\n        ")))
    (tmp_path / "sitecustomize.py").write_text(ENDLESS_IMPORT)
    for pipe in ("importing", "never"):
        os.mkfifo(tmp_path / pipe)
    job = start(script)
    with (tmp_path / "importing").open("rb", buffering=0) as importing:
        assert importing.read(1) == b"x"
        os.killpg(job.pid, signal.SIGINT)
        _, errors = job.communicate(timeout=ENDING_S)  # workers that have begun nothing are not waited for
    assert job.returncode == 130, errors
    assert errors == ""


STARTING_WORKERS = """
import sys, time
from pathlib import Path
from egopatch.extract.engines.joblib_engine import call_in_workers
from egopatch.features.common.signals import Requeue, requeue_on_signals
folder = Path(__file__).parent

def commit(call: int) -> None:
    (folder / f"begun {call}").touch()
    try:
        time.sleep(60)
    finally:
        time.sleep(1)
        (folder / f"ended {call}").touch()

if __name__ == "__main__":
    try:
        with requeue_on_signals():
            call_in_workers(commit, [(0,), (1,)])
    except Requeue as notice:
        sys.exit(str(notice))
"""
SLOW_SECOND_IMPORT = """
import sys, time
from pathlib import Path
folder = Path(__file__).parent
if any(arg.endswith("popen_loky_posix") for arg in sys.orig_argv):
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        (folder / "importing").touch()
        time.sleep(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
def test_worker_signalled_while_importing_lets_the_other_finish_its_commit(to_all: bool, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(STARTING_WORKERS)
    (tmp_path / "sitecustomize.py").write_text(SLOW_SECOND_IMPORT)
    job = start(script)
    wait_until(lambda: all((tmp_path / file).exists() for file in ("begun 0", "importing")))
    (os.killpg if to_all else os.kill)(job.pid, signal.SIGTERM)
    _, errors = job.communicate()
    assert errors == "SIGTERM\n"
    assert sorted(file.name for file in tmp_path.glob("* ?")) == ["begun 0", "ended 0"]
