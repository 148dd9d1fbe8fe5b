"""Every committed benchmark runs: they use internal classes, whose changes nothing else would notice."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks._machine import stamp
from benchmarks.gpu import PARTS, summary
from benchmarks.gpu_stage_one import GpuUse

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
# Run by tests/test_gpu_dry_run.py: gpu.py starts the others. kernel_budget.py: tests/train/ops/test_triton.py.
ELSEWHERE = {"gpu", "gpu_small", "gpu_stage_one", "gpu_step", "encoder", "kernel_budget"}
KEYS = {
    "feed": "handover_clips_per_s",
    "pipeline": "pipeline_clips_per_s",
    "egosynth": "table",
    "sweep_cost": "by_batch",
    "store": "reached",
    "random_faults": "events",
}


def test_benchmarks_skipped_here_are_run_by_other_tests() -> None:
    assert ELSEWHERE <= SCRIPTS
    dry = {word for part in PARTS if "--help" not in part.dry for word in part.dry}
    assert {f"benchmarks/{name}.py" for name in ELSEWHERE - {"gpu", "kernel_budget"}} <= dry
    text, _ = summary(RESULTS / "no results", stamp("triton"))
    assert text.count("not run") == len(PARTS)
    assert "versions" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCRIPTS - ELSEWHERE))
def test_quick_benchmark_measures_without_changing_saved_results(name: str, tmp_path: Path) -> None:
    if name == "index_cost" and subprocess.run(["git", "cat-file", "-e", "b431f91"], cwd=ROOT).returncode:
        pytest.skip("a clone without history has no reader to compare with")
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert KEYS.get(name, "machine") in found
    assert {"cpu", "cores", "gpu", "memory_gb", "system", "date", "versions"} <= found["machine"].keys()
    assert {"python", "torch", "numpy"} <= found["machine"]["versions"].keys()
    assert {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before


def test_gpu_use_samples_only_the_gpu_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node of eight, seven idle ones would be seven samples of 0."""
    smi, args = tmp_path / "nvidia-smi", tmp_path / "args"
    smi.write_text(f'#!/bin/sh\necho "$@" > {args}.new && mv {args}.new {args}\necho 93\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda:3"): SimpleNamespace(uuid="a1")}.get)
    with GpuUse(torch.device("cuda:3")):
        while not args.exists():
            time.sleep(0.01)
    assert "--id=GPU-a1" in args.read_text().split()
    with GpuUse(torch.device("cpu")) as use:
        pass
    assert not use.samples
