"""Fixtures of the operator tests."""

import os

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device; skips where there is none, or fails there when FAIL_WITHOUT_CUDA=1."""
    if not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail("FAIL_WITHOUT_CUDA=1 and torch.cuda.is_available() is false")
        pytest.skip("no CUDA device")
    return torch.device("cuda")
