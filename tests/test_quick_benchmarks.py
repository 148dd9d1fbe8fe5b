"""The benchmarks of stage one run as they are committed: they use its inner classes, which change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), [("feed", "handover_clips_per_s"), ("pipeline", "pipeline_clips_per_s")])
def test_a_quick_run_measures(name: str, key: str, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert key in json.loads(out.read_text())
