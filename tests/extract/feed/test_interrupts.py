"""Ctrl-C while children import what they need: the children print nothing, and the parent decides what happens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DECODERS = """
with DecodePool(VideoConfig(), 2, prepare) as pool:
    list(pool.map([Clip("a", Path("a")), Clip("b", Path("b"))]))
"""
WORKERS = "call_in_workers(prepare, [(0,), (1,)])"
SCRIPT = """
import os, sys
from pathlib import Path
os.environ.setdefault("PARENT", str(os.getpid()))  # children run this file too
from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.engines.joblib_engine import call_in_workers
from egopatch.extract.feed.pool import DecodePool
from tests.extract.feed.slow_import import prepare
if __name__ == "__main__":
    try:
        {work}
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("work", [DECODERS, WORKERS], ids=["decoders", "workers"])
def test_children_interrupted_while_importing_print_nothing(work: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(work=work.strip().replace("\n", "\n        ")))
    pipes = {name: tmp_path / name for name in ("IMPORTING", "NEVER")}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    environment = os.environ | {name: str(pipe) for name, pipe in pipes.items()} | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with pipes["IMPORTING"].open("rb", buffering=0) as importing:
        assert importing.read(1) == b"x"
        os.killpg(job.pid, signal.SIGINT)
        _, errors = job.communicate()
    assert job.returncode == 130, errors
    assert errors == ""
