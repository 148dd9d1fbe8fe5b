"""Unavailable devices are refused by name before anything is loaded."""

import platform

import pytest
import torch

from egopatch.configs.schema import ConfigError
from egopatch.extract.worker.device import describe_machine, device_of, device_of_worker


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
    monkeypatch.setattr("egopatch.extract.worker.device.has_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    cpu = describe_machine(torch.device("cpu"))
    assert cpu.startswith(f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()} with bfloat16, torch ")
    assert describe_machine(torch.device("cuda:1")) == f"GPU of cuda:1, torch {torch.__version__}"
