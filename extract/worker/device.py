"""The device that the encoder runs on, and advice where the configured arithmetic is slow on it."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from egopatch.configs.schema import Config, ConfigError, EncoderConfig
from egopatch.extract.encoders.networks import imported
from egopatch.extract.errors import JobFailed
from egopatch.features.common.machine import find_device, has_bfloat16, usable_gpus
from egopatch.features.common.os_errors import gpu_shortage

EVERY_GPU = ("auto", "cuda")  # values of `encoder.device` that let workers take the GPUs in turn


def device_of(name: str) -> torch.device:
    """The device called `name`, as `encoder.device` is.

    Raises:
        ConfigError: This machine has no device of that name.
    """
    try:
        return find_device(name)
    except ValueError as error:
        raise ConfigError(f"encoder.device is {name!r}; {error}") from None


def device_of_worker(name: str, rank: int) -> str:
    """Name of the device of worker `rank` of this machine, where `encoder.device` is `name`."""
    gpus = usable_gpus() if name in EVERY_GPU else 0
    return f"cuda:{rank % gpus}" if gpus else name


def describe_machine(device: torch.device) -> str:
    """Description of all that decides the last bits of tokens from `device`: its name or instructions, and torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        bfloat16 = " with bfloat16" if has_bfloat16(device) else ""
        name = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}{bfloat16}"
    return f"{name}, torch {torch.__version__}"


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block, a GPU keeps all bits of float32.

    By default torch rounds it to the 11 bits of TF32 in convolutions, and also in matrix products if the environment
    (`TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`) or a notebook says so.
    """
    newer = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    chosen = [option.fp32_precision for option in newer]
    try:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's newer options were set in a way that these cannot express
        before = None
    try:
        if before is not None:
            torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
        for option in newer:
            option.fp32_precision = "ieee"
        yield
    finally:
        if before is not None:
            torch.backends.cudnn.allow_tf32 = before[0]
            torch.set_float32_matmul_precision(before[1])
        for option, precision in zip(newer, chosen, strict=True):
            option.fp32_precision = precision


@contextmanager
def shortage_explained(encoder: EncoderConfig | None) -> Iterator[None]:
    """Turn a GPU's lack of memory into a JobFailed that names the batch size to try.

    Args:
        encoder: The encoder of clips; None while questions are encoded, whose batches have one size.
    """
    try:
        yield
    except RuntimeError as error:
        if (shortage := gpu_shortage(error)) is None:
            raise
        advice = "while questions were encoded; free some of its memory, or choose another --encoder.device"
        if encoder is not None:
            smaller = f"--encoder.batch {encoder.batch // 2}" if encoder.batch > 1 else "a smaller --encoder.depth"
            advice = f"with encoder.batch {encoder.batch}; try {smaller}, or free some of its memory"
        raise JobFailed(f"{shortage}, {advice}") from error


def arithmetic_advice(config: Config, device: torch.device) -> str | None:
    """One line of advice if `device` lacks the instructions of `encoder.dtype`."""
    encodes = config.encoder.arch != imported.NETWORK.name
    if not encodes or config.encoder.dtype != "bfloat16" or has_bfloat16(device):
        return None
    if device.type == "cpu":
        lacks = "this CPU has no bfloat16 instructions, which makes encoding about 6 times slower than float32"
    else:
        lacks = f"{torch.cuda.get_device_name(device)} has no bfloat16 instructions, so torch imitates them"
    return f"encoder.dtype is bfloat16, but {lacks}; consider --encoder.dtype float32, which needs another store"
