"""How the tests of the Triton kernels run and judge them: on a GPU, or on the CPU in Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from egopatch.train.ops.select_attend import SelectAttendOutput, select_attend
from tests.train.ops.cases import Case, assert_as_exact_as, assert_same_selection, gradients, low_precision, oracle

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
# A GPU multiplies float32 as three products of tf32 halves, which keep 22 of 24 bits.
TF32_PARTS = 1 if INTERPRETED else 4
NAMES = ["pooled", "lse", "grad queries", "grad selector", "grad bias"]


def run(case: Case, leaves: list[Tensor], k: int) -> SelectAttendOutput:
    return select_attend(case.tokens, case.clip_index, *leaves, k, case.scale, implementation="triton")


def yardstick(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the kernel multiplies."""
    if dtype == torch.bfloat16:
        return torch.float32 if INTERPRETED else torch.bfloat16
    return torch.float32 if dtype == torch.float32 else torch.float16


def check(case: Case, k: int, size: float = 1.0) -> SelectAttendOutput:
    """Selection, outputs and every gradient against the loops in float64."""
    exact_leaves, eager_leaves, leaves = case.leaves(torch.float64), case.leaves(), case.leaves()
    out = run(case, leaves, k)
    assert_same_selection(out.kept, case, k)
    exact_case = Case(case.tokens, case.clip_index, *exact_leaves, case.scale)
    exact, _ = oracle(exact_case, k, out.kept)
    eager = low_precision(case, eager_leaves, out.kept, yardstick(case.tokens.dtype))
    exact_all = [*exact, *gradients(*exact, exact_leaves)]
    eager_all = [*eager, *gradients(*eager, eager_leaves)]
    actual_all = [out.pooled, out.lse, *gradients(out.pooled, out.lse, leaves, size)]
    for name, a, e, x in zip(NAMES, actual_all, eager_all, exact_all, strict=True):
        assert_as_exact_as(a, e, x, name, times=TF32_PARTS if case.tokens.dtype == torch.float32 else 1)
    return out


def poison(monkeypatch: pytest.MonkeyPatch, value: float = math.nan) -> None:
    """Fill the memory that the kernels allocate with `value`, or -1 in integers, until they write it."""
    from egopatch.train.ops.select_attend import kernels

    def poisoned(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(size, value if dtype.is_floating_point else -1, dtype=dtype, device=device)

    monkeypatch.setattr(kernels.torch, "empty", poisoned)
