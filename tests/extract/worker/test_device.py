"""Devices that are not there are refused by name, before anything is loaded."""

import pytest
import torch

from egopatch.configs.schema import ConfigError
from egopatch.extract.worker.device import device_of


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"encoder\.device is 'cuda:1'; torch sees no CUDA device here"):
        device_of("cuda:1")


def test_a_number_that_no_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("auto") == torch.device("cuda")
    assert device_of("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"encoder\.device is 'cuda:2'; torch sees CUDA devices 0 to 1 here"):
        device_of("cuda:2")
