"""Unavailable devices are refused by name before anything is loaded."""

import platform
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from egopatch.configs.schema import Config, ConfigError, EncoderConfig
from egopatch.extract.worker.device import (
    arithmetic_advice,
    describe_machine,
    device_of,
    device_of_worker,
    full_float32,
)


def test_cuda_is_refused_and_auto_uses_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"encoder\.device is 'cuda:1'; torch sees no CUDA device here"):
        device_of("cuda:1")


@pytest.mark.parametrize("name", ["gpu0", "mps", "cuda:x", ""])
def test_unknown_device_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"encoder\.device is '{name}'; expected auto, cpu, cuda, or cuda:N"):
        device_of(name)


def test_workers_rotate_over_gpus_unless_a_device_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert [device_of_worker(name, rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    for name in ("cpu", "cuda:1"):
        assert [device_of_worker(name, rank) for rank in range(3)] == [name] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_worker("auto", 1) == "auto"


def test_machine_description_names_the_device_and_torch_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egopatch.extract.worker.device.has_bfloat16", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    cpu = describe_machine(torch.device("cpu"))
    assert cpu.startswith(f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()} with bfloat16, torch ")
    assert describe_machine(torch.device("cuda:1")) == f"GPU of cuda:1, torch {torch.__version__}"


def test_a_gpu_without_bfloat16_prints_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    gpu = torch.device("cuda")
    advice = arithmetic_advice(Config(), gpu)
    assert advice is not None
    assert (
        "but Tesla T4 has no bfloat16 instructions, so torch imitates them; consider --encoder.dtype float32" in advice
    )
    assert arithmetic_advice(Config(encoder=EncoderConfig(dtype="float32")), gpu) is None


@pytest.fixture
def newer_options() -> Iterator[tuple[Any, ...]]:
    """The options by which torch 2.9 and later choose TF32: for everything, convolutions and matrix products."""
    options = torch.backends, torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before, legacy = [option.fp32_precision for option in options], torch.get_float32_matmul_precision()
    yield options
    torch.set_float32_matmul_precision(legacy)
    for option, precision in zip(options, before, strict=True):
        option.fp32_precision = precision


@pytest.mark.parametrize("legacy", ["highest", "high"])
@pytest.mark.parametrize("chosen", [("tf32", "tf32", "tf32"), ("none", "ieee", "tf32"), ("none", "tf32", "none")])
def test_full_float32_overrides_the_newer_options_and_restores_them(
    newer_options: tuple[Any, ...], legacy: str, chosen: tuple[str, ...]
) -> None:
    torch.set_float32_matmul_precision(legacy)
    for option, precision in zip(newer_options, chosen, strict=True):
        option.fp32_precision = precision
    before = [option.fp32_precision for option in newer_options]
    with full_float32():
        assert [option.fp32_precision for option in newer_options[1:]] == ["ieee", "ieee"]
    assert [option.fp32_precision for option in newer_options] == before
