"""Context of every benchmark result, the machine and the versions, and the path where the result belongs."""

import argparse
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def stamp(*packages: str) -> dict[str, object]:
    """Hardware, load and versions, as every result has them under `machine`.

    Args:
        packages: Packages whose versions matter besides Python, torch and numpy; a missing one gets None.
    """
    # Imported here: decoder children import the scripts that import this file, and only decode.
    import psutil
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": bfloat16_instructions(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in ("torch", "numpy", *packages)}},
    }


def bfloat16_instructions() -> bool:
    """Whether this CPU has bfloat16 instructions; without them PyTorch emulates the type."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def add_result_arguments(parser: argparse.ArgumentParser, name: str | None, quick: str) -> None:
    """Add `--out` and `--quick`.

    Args:
        parser: The script's parser.
        name: File in `benchmarks/results` where a result goes without `--out`; None prints it only.
        quick: What a quick run leaves out.
    """
    default = "without it, nothing is written" if name is None else f"default: benchmarks/results/{name}"
    parser.add_argument("--out", type=Path, default=None, help=f"JSON file for the result; {default}")
    parser.add_argument("--quick", action="store_true", help=f"{quick}, to see that it runs; a result needs --out")
    parser.set_defaults(result=name)


def write_result(options: argparse.Namespace, result: object) -> Path | None:
    """Write a result as JSON where it belongs; returns its path, None if it is only printed.

    A quick run without `--out` is only printed.
    """
    path: Path | None = options.out
    if path is None and not options.quick and options.result is not None:
        path = RESULTS / options.result
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def resident(field: str) -> int:
    """Bytes of this process in `/proc/self/status`: VmRSS is the current value, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
