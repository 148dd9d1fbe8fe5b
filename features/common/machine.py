"""The part of its machine that this process may use: cores, GPUs, torch's threads and its memory.

Schedulers and containers give a process a part of the machine, in three ways: a set of cores (affinity), a share of the
cores' time (a quota of its control group, or of a group around it), and `CUDA_VISIBLE_DEVICES`, which torch respects.
"""

import functools
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from egopatch.features.common.os_errors import gpu_shortage

if TYPE_CHECKING:
    import torch

# Versions of Triton, (major, minor): the oldest that compiled the kernels of stage two and ran them on a GPU, which
# torch 2.10 and 2.11 bring; the first with which the sizes that were measured on an H100 spill registers, so that
# smaller ones are used; and the newest that was tried.
OLDEST_TRITON, SPILLING_TRITON, NEWEST_TRITON = (3, 6), (3, 8), (3, 9)
# Compute capability (major, minor) of the oldest GPUs that Triton compiles for.
OLDEST_GPU = (8, 0)


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as `3.6.0+git1234`."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def usable_cores(root: Path = Path("/")) -> int:
    """Number of cores that this process may use; `root` is where /proc and /sys are found."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([cores, *map(math.ceil, _quotas(root))]), 1)


def request_huge_pages() -> None:
    """Let torch ask Linux for pages of 2 MB under tensors of at least that size, unless the environment decides it.

    The memory of a new tensor costs a page fault for each page: with pages of 4 KB, those of a clip that
    EfficientNet-Lite0 encodes take a third of its time (`benchmarks/huge_pages.py`). This process must not have
    imported torch yet, which reads the variable only then.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def usable_gpus() -> int:
    """Number of GPUs that this process may use; they are called cuda:0, cuda:1 and so on."""
    # Imported here, because torch takes seconds to import.
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def find_device(name: str) -> "torch.device":
    """The device called `name`; `auto` is CUDA if this process may use a GPU, else the CPU.

    Raises:
        ValueError: This machine has no device of that name; the message says what to use.
    """
    import torch

    gpus = usable_gpus()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    expected = "expected auto, cpu, cuda, or cuda:N with the number of a GPU"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(expected) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(expected)
    if device.type == "cuda" and not gpus:
        raise ValueError("torch sees no CUDA device here: use auto or cpu")
    if device.type == "cuda" and device.index is not None and device.index >= gpus:
        raise ValueError(f"torch sees CUDA devices 0 to {gpus - 1} here: use one of them or auto")
    return device


@functools.cache
def triton_fault(device: "torch.device") -> str | None:
    """Why Triton's kernels cannot run on a GPU of this machine, and what they need; None if they can.

    Raises:
        RuntimeError: The GPU has no free memory.
    """
    if find_spec("triton") is None:
        return "Triton is not installed; expected 3.6 or newer (pip install triton)"
    import torch
    from triton.runtime import driver

    if torch.version.hip is not None:
        return "torch is built for AMD's GPUs; the kernels are for NVIDIA's"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"{device} has compute capability {'.'.join(map(str, capability))}; expected 8.0 or newer"
    try:
        driver.active.get_current_device()  # at its first use on a machine, Triton builds a part of itself
    except Exception as error:  # of many types, such as a RuntimeError, and the compiler's own
        if gpu_shortage(error):
            raise
        reason = " ".join(str(error).split())[:160]
        return f"Triton cannot start ({reason}); expected a C compiler, such as gcc, and Python's headers"
    return None


def has_bfloat16(device: "torch.device") -> bool:
    """Whether `device` has instructions for matrix products in bfloat16; without them torch imitates it, slowly."""
    import torch

    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def limit_threads(processes: int = 1) -> None:
    """Limit torch to this process's share of the cores, if `processes` processes like it run together."""
    import torch

    torch.set_num_threads(max(min(torch.get_num_threads(), usable_cores() // processes), 1))


def _quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in cores, of this process's control groups and of the groups around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        if not controllers:  # version 2, alone or beside version 1
            bases, names = [mounts, mounts / "unified"], ["cpu.max"]
        elif "cpu" in controllers.split(","):
            bases, names = [mounts / controllers, mounts / "cpu"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container the path may be the host's; the container's own group is then at the top.
        for folder in (base / part for base in bases for part in (group, *group.parents)):
            try:
                quota, period = " ".join((folder / name).read_text() for name in names).split()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
