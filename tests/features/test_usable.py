"""What a process may use of its machine, with faked control groups and devices."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from egopatch.features.common.machine import find_device, limit_threads, triton_fault, usable_cores

EIGHT = set(range(8))
CUDA = torch.device("cuda", 1)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: EIGHT)
    return tmp_path


def write(root: Path, **files: str) -> None:
    """Files by path, with __ for a slash."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")


def groups(root: Path, *lines: str) -> None:
    write(root, proc__self__cgroup="\n".join(lines))


def version_two(root: Path, group: str, quota: str) -> None:
    write(root, **{f"sys/fs/cgroup/{group}/cpu.max": quota})


def version_one(root: Path, group: str, quota: str, mount: str = "cpu") -> None:
    folder = f"sys/fs/cgroup/{mount}/{group}"
    write(root, **{f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"})


def test_usable_cores_follow_cpu_affinity(root: Path) -> None:
    assert usable_cores(root) == 8


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 3), ("50000 100000", 1), ("9000000 100000", 8)],
)
def test_usable_cores_follow_a_cgroup_v2_quota(root: Path, quota: str, cores: int) -> None:
    groups(root, "0::/job/step")
    version_two(root, "job/step", quota)
    assert usable_cores(root) == cores


def test_the_smallest_quota_of_enclosing_cgroups_counts(root: Path) -> None:
    groups(root, "0::/slice/job/step")
    for group, quota in (("slice", "600000 100000"), ("slice/job", "200000 100000"), ("slice/job/step", "max 100000")):
        version_two(root, group, quota)
    version_two(root, "slice/other", "100000 100000")
    assert usable_cores(root) == 2


def test_a_quota_at_the_cgroup_root_of_a_container_counts(root: Path) -> None:
    groups(root, "0::/docker/of/the/host")
    version_two(root, "", "200000 100000")
    assert usable_cores(root) == 2


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("400000", 4), ("150000", 2)])
def test_usable_cores_follow_a_cgroup_v1_quota(root: Path, mount: str, quota: str, cores: int) -> None:
    groups(root, "5:memory:/other", "4:cpu,cpuacct:/job", "0::/")
    version_one(root, "job", quota, mount)
    assert usable_cores(root) == cores


def test_malformed_cgroup_files_impose_no_limit(root: Path) -> None:
    groups(root, "0::/")
    version_two(root, "", "what")
    assert usable_cores(root) == 8


def test_limit_threads_keeps_torch_within_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        monkeypatch.setattr("egopatch.features.common.machine.usable_cores", lambda: 4)
        for processes, expected in ((1, 4), (2, 2), (8, 1)):
            torch.set_num_threads(6)
            limit_threads(processes)
            assert torch.get_num_threads() == expected
        torch.set_num_threads(3)
        limit_threads()
        assert torch.get_num_threads() == 3  # as OMP_NUM_THREADS says
    finally:
        torch.set_num_threads(threads)


def test_find_device_resolves_names_and_refuses_unknown_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    for name, reason in (("cuda:2", "CUDA devices 0 to 1"), ("gpu", "expected auto, cpu, cuda")):
        with pytest.raises(ValueError, match=reason):
            find_device(name)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_without_a_c_compiler_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds a part of itself at its first use; images for running, not developing, have no compiler."""

    class Driver:
        @property
        def active(self) -> object:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr("triton.runtime.driver", Driver())
    fault = triton_fault.__wrapped__(CUDA)  # without the cache
    assert fault is not None
    assert fault.startswith("Triton cannot start (Failed to find C compiler. Please")
    assert fault.endswith("expected a C compiler, such as gcc, and Python's headers")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_does_not_compile_for_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a T4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert triton_fault.__wrapped__(CUDA) == "cuda:1 has compute capability 7.5; expected 8.0 or newer"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_do_not_run_on_gpus_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which torch says that they are CUDA devices."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert triton_fault.__wrapped__(CUDA) == "torch is built for AMD's GPUs; the kernels are for NVIDIA's"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_on_a_full_gpu_does_not_lack_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        @property
        def active(self) -> object:
            raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr("triton.runtime.driver", Driver())
    with pytest.raises(RuntimeError, match="out of memory"):
        triton_fault.__wrapped__(CUDA)


@pytest.mark.slow
def test_large_tensors_are_in_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this machine gives no huge pages")
    program = """
import resource
from egopatch.features.common.machine import request_huge_pages
request_huge_pages()
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    faults = int(subprocess.check_output([sys.executable, "-c", program], env=environment, text=True))
    assert faults < 4000  # 16,384 with pages of 4 KB; some of the memory may be in small pieces
