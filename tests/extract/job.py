"""What tests of whole jobs share: their command lines, and how stores are compared."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config
from egopatch.features import open_store

CLIPS = 20
# Journals may contain the same lines in another order, and their heads follow them. Leases and locks come and go: a job
# that is killed just after a commit leaves a lease behind, which then expires.
NOT_COMPARED = (".lock", ".head")


def options(root: Path, *more: str) -> list[str]:
    """A small network on twenty clips, four shards of five."""
    return [
        *("--config", "configs/demo/egovlpv2.yaml", "--data.root", str(root / "data"), "--store.shard", "5"),
        *("--encoder.checkpoint", str(root / "weights.pth"), "--text.model", str(root / "tokenizer")),
        *("--store.path", str(root / "store"), "--encoder.batch", "4", "--engine.decoders", "1", *more),
    ]


def slowly(root: Path, *more: str) -> list[str]:
    """A job that can be interrupted at many points: one shard per clip."""
    return options(root, "--store.shard", "1", "--encoder.batch", "1", *more)


def committed(store: Path) -> int:
    """How many clips a store holds, if there is one."""
    return len(open_store(store).clip_ids) if (store / "store.json").exists() else 0


def config_of(root: Path, *more: str) -> Config:
    """The config that `options` describe."""
    args = options(root, *more)
    return load_config(Path(args[1]), args[2:])


def videos(root: Path) -> list[Path]:
    """The video files, in the order of the clips."""
    return sorted((root / "data" / "qa_videos").iterdir())


def start_job(args: list[str], command: str = "run") -> "subprocess.Popen[str]":
    """A job in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "extract", command, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    """Return when `condition` holds; fail if it does not hold soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def signal_all(job: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """What a terminal does on Ctrl-C, and a scheduler on any signal: every process of the job gets it."""
    os.killpg(job.pid, number)


def contents(store: Path) -> dict[str, bytes]:
    """Every file that holds or describes rows, both halves of the store."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.parent.name != "leases"
        if path.name != "ledger.jsonl" and not path.name.endswith(NOT_COMPARED)
    }


def ledger_lines(store: Path) -> "Counter[str]":
    """The ledger's lines, regardless of their order."""
    lines = (store / "ledger.jsonl").read_text().splitlines()
    return Counter(json.dumps(json.loads(line)["record"], sort_keys=True) for line in lines)
