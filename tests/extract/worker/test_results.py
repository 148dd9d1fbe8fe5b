"""Buffers for rows: reused when their rows are dropped, and never before."""

import numpy as np
import pytest
import torch

from egopatch.extract.errors import JobFailed
from egopatch.extract.worker.results import ResultMemory

BATCH = {"patches": torch.empty(2, 3, dtype=torch.float16), "cls": torch.empty(2, 5)}


def nothing(_: np.ndarray) -> None:
    pass


def test_a_buffer_is_free_when_its_last_row_is_dropped() -> None:
    memory = ResultMemory(40, 1000, nothing, nothing)
    first = memory.empty_like(BATCH)
    for name, tensor in BATCH.items():
        assert (first[name].shape, first[name].dtype) == (tensor.shape, tensor.dtype)
        first[name].fill_(1)
    row = {name: tensor[1] for name, tensor in first.items()}
    del first
    others = [memory.empty_like(BATCH) for _ in range(20)]
    for other in others:
        for tensor in other.values():
            tensor.fill_(2)
    assert all((tensor == 1).all() for tensor in row.values())
    made = memory.buffers
    assert made >= 21
    others.clear()
    for _ in range(50):
        memory.empty_like(BATCH)
    assert memory.buffers <= made + 1, "buffers that are free are not used again"
    memory.close()


def test_memory_is_pinned_before_it_is_used_and_unpinned_at_the_end() -> None:
    pinned: list[int] = []
    unpinned: list[int] = []
    memory = ResultMemory(8, 100, lambda m: pinned.append(m.ctypes.data), lambda m: unpinned.append(m.ctypes.data))
    rows = memory.empty_like(BATCH)
    assert rows["patches"].data_ptr() in pinned
    memory.close()
    assert sorted(unpinned) == sorted(pinned)
    rows["patches"].fill_(1)  # still valid


def test_failure_to_pin_memory_is_raised_to_the_caller() -> None:
    def refuse(_: np.ndarray) -> None:
        raise JobFailed("CUDA cannot pin 1000 bytes of memory")

    memory = ResultMemory(8, 1000, refuse, nothing)
    with pytest.raises(JobFailed, match="cannot pin 1000 bytes"):
        memory.empty_like(BATCH)
    memory.close()
