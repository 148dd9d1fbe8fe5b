"""The kernels of Philox against NumPy's, bit for bit. `test_triton.py` runs them in Triton's interpreter, in a separate
process because the interpreter is chosen when the kernels are imported; `test_cuda.py` runs them on a GPU.
"""

import pytest
import torch

from egopatch.train.ops.philox import Draw, api, dropout, kernels, reference, uniform
from tests.train.ops.kernel_checks import DEVICE

SEEDS = (3, 2**64 - 1, 3)
SHAPES = [(1, 16), (2, 5), (3, 7, 9), (70, 33)]


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_by_kernel", lambda _: True)


def draw(rows: torch.Tensor | None = None) -> Draw:
    return Draw(SEEDS, 5, torch.tensor([-1, 2**33], device=DEVICE), rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_numbers_match_the_reference(shape: tuple[int, ...]) -> None:
    found = uniform(shape, draw(), torch.device(DEVICE))
    assert torch.equal(found.cpu(), reference.uniform(shape, draw()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(len(SEEDS), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    leaf = x.to(DEVICE).requires_grad_()
    out = dropout(leaf, draw(), 0.3)
    out.backward(leaf.detach())
    expected = (x * reference.dropout_factor(shape, draw(), 0.3)).to(dtype)
    assert torch.equal(out.detach().cpu(), expected)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.cpu(), expected)


def test_rows_of_a_rank_match_those_of_the_whole_batch() -> None:
    rows = torch.tensor([1, 2, 5], device=DEVICE)
    x = torch.ones(len(SEEDS), 6, 40, device=DEVICE)
    assert torch.equal(dropout(x[:, rows], draw(rows), 0.5), dropout(x, draw(), 0.5)[:, rows])


def test_a_strided_tensor_gives_the_result_of_its_contiguous_copy() -> None:
    x = torch.randn(len(SEEDS), 20, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(1, 2)
    assert torch.equal(dropout(x, draw(), 0.5), dropout(x.contiguous(), draw(), 0.5))


def test_a_single_head_has_no_head_dimension() -> None:
    one = Draw(SEEDS[:1], 5, torch.tensor([1, 2], device=DEVICE))
    x = torch.ones(7, 9)
    assert torch.equal(dropout(x.to(DEVICE), one, 0.5).cpu(), x * reference.dropout_factor((7, 9), one, 0.5))
    assert torch.equal(uniform((7, 9), one, torch.device(DEVICE)).cpu(), reference.uniform((7, 9), one))


def test_dropout_of_zero_rows_is_empty() -> None:
    assert kernels.dropout(torch.ones(0, 4, device=DEVICE), Draw(), 0.5).shape == (0, 4)
