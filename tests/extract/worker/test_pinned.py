"""Registration of memory with CUDA, whose runtime a stand-in replaces."""

from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from egopatch.extract.errors import JobFailed
from egopatch.extract.worker import pinned
from egopatch.extract.worker.pinned import PinnedSlots, pin_in_thread, unpin

STEP = pinned._STEP


class CudaError(IntEnum):
    success = 0
    invalid_argument = 1
    out_of_memory = 2


class Runtime:
    """Memory that is registered, by address, and the GPUs that were made current. Refuses what CUDA refuses."""

    cudaError = CudaError

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.current: list[torch.device] = []
        self.most = 1 << 40

    def cudaHostRegister(self, address: int, size: int, _: int) -> CudaError:
        assert address not in self.registered, "CUDA refuses to register memory twice"
        if size > self.most:
            return CudaError.out_of_memory
        self.registered[address] = size
        return CudaError.success

    def cudaHostUnregister(self, address: int) -> CudaError:
        return CudaError.success if self.registered.pop(address, 0) else CudaError.invalid_argument

    def cudaGetErrorString(self, error: CudaError) -> str:
        return error.name.replace("_", " ")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    stand_in = SimpleNamespace(cudart=lambda: made, set_device=made.current.append)
    monkeypatch.setattr(torch, "cuda", stand_in)
    return made


def test_a_slot_is_registered_as_far_as_it_is_used(runtime: Runtime) -> None:
    slots, first, second = PinnedSlots(), np.empty(4 * STEP, np.uint8), np.empty(STEP // 2, np.uint8)
    address = first.ctypes.data
    for used, registered in ((10, STEP), (STEP, STEP), (STEP + 1, 2 * STEP), (5, 2 * STEP), (4 * STEP, 4 * STEP)):
        slots.cover(first, used)
        assert runtime.registered == {address: registered}
    slots.cover(second, 10)
    assert runtime.registered == {address: 4 * STEP, second.ctypes.data: STEP // 2}  # never beyond the slot
    slots.release()
    assert runtime.registered == {}


def test_results_are_pinned_for_their_own_gpu(runtime: Runtime) -> None:
    memory, device = np.empty(100, np.uint8), torch.device("cuda", 1)
    pin_in_thread(device, memory)
    assert (runtime.registered, runtime.current) == ({memory.ctypes.data: 100}, [device])
    unpin(memory)
    assert runtime.registered == {}


def test_refused_memory_is_reported_and_can_be_tried_again(runtime: Runtime) -> None:
    slots, memory = PinnedSlots(), np.empty(2 * STEP, np.uint8)
    runtime.most = STEP
    slots.cover(memory, 1)
    with pytest.raises(
        JobFailed, match=rf"pin {2 * STEP} bytes of memory \(out of memory, error 2\); free some memory"
    ):
        slots.cover(memory, 2 * STEP)
    assert runtime.registered == {}
    slots.release()  # releases nothing twice
    runtime.most = 1 << 40
    slots.cover(memory, 2 * STEP)
    assert runtime.registered == {memory.ctypes.data: 2 * STEP}


def test_another_refusal_is_named_without_advice_about_memory(runtime: Runtime) -> None:
    with pytest.raises(JobFailed, match=r"^CUDA cannot release pinned memory \(invalid argument, error 1\)$"):
        unpin(np.empty(100, np.uint8))
