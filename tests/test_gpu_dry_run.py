"""`make gpu` keeps working on machines without a GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks.gpu import CUDA_FILES
from benchmarks.gpu_step import kernel_microseconds

ROOT = Path(__file__).resolve().parents[1]


def gpu(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_dry_run_completes_every_part(tmp_path: Path) -> None:
    result = gpu("--dry-run", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    parts = {"tests", "races", "memory", "kernels", "one_question", "encoder", "step", "stage_one", "nvdec"}
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*.part.json")]
    assert {record["part"] for record in records} == parts
    assert {record["exit_code"] for record in records} <= {0, 5}


def test_annotations_of_a_profile_do_not_count_as_kernels() -> None:
    """The profiler gives the optimiser's step, whose kernels it also lists, a time on the GPU of its own."""
    of_gpu = {"device_type": DeviceType.CUDA, "self_device_time_total": 3.0}
    kernel = SimpleNamespace(**of_gpu, is_user_annotation=False)
    step = SimpleNamespace(**of_gpu, is_user_annotation=True)
    operator = SimpleNamespace(device_type=DeviceType.CPU, self_device_time_total=3.0, is_user_annotation=False)
    assert kernel_microseconds([kernel, step, operator]) == 3.0


@pytest.mark.slow
def test_missing_gpu_is_reported_with_exit_code_2() -> None:
    result = gpu(CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert "torch sees no CUDA device; expected one, or --dry-run" in result.stderr


def test_gpu_run_includes_every_test_file_that_uses_a_gpu() -> None:
    """Including tests that take the fixture `device` and are not marked `cuda` themselves."""
    taking = set()
    for file in (ROOT / "tests").glob("**/test_*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                given = {(one.arg, one.annotation and ast.unparse(one.annotation)) for one in function.args.args}
                if given & {("device", "torch.device"), ("cuda", "torch.device")}:
                    taking.add(str(file.relative_to(ROOT)))
    assert taking
    assert taking <= set(CUDA_FILES)
