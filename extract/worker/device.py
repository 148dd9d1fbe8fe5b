"""The device that the encoder runs on, and advice where the configured arithmetic is slow on it."""

import torch

from egopatch.configs.schema import Config, ConfigError


def device_of(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA if torch sees a CUDA device, else the CPU.

    Raises:
        ConfigError: `name` is a CUDA device that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"encoder.device is {name!r}; torch sees no CUDA device here: use auto or cpu")
    device = torch.device(name)
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(
            f"encoder.device is {name!r}; torch sees CUDA devices 0 to {last} here: use one of them or auto"
        )
    return device


def has_bfloat16() -> bool:
    """Whether torch's matrix products use instructions of this CPU for bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def arithmetic_advice(config: Config, device: torch.device) -> str | None:
    """One line of advice if another `encoder.dtype` would be far faster on `device`."""
    if device.type == "cpu" and config.encoder.dtype == "bfloat16" and not has_bfloat16():
        return (
            "encoder.dtype is bfloat16, but this CPU has no bfloat16 instructions, which makes encoding about 6 times"
            " slower than float32; consider --encoder.dtype float32 (another fingerprint, so another store)"
        )
    return None
