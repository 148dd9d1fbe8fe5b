"""RowPicker by index: values and gradients of torch's indexing, under `vmap` too."""

import torch

from egopatch.train.ops.rows import RowPicker


def tables(*lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(*lead, 4, 3, 5, generator=generator, requires_grad=True)
    return table, torch.randn(*lead, 6, 3, 5, generator=generator)


# A row may be picked often, or never.
INDEX = torch.tensor([2, 0, 2, 2, 3, 0])


def test_picked_rows_and_gradients_match_indexing() -> None:
    table, weights = tables()
    picked = RowPicker(INDEX, 4).of(table)
    assert torch.equal(picked, table[INDEX])
    (found,) = torch.autograd.grad((picked * weights).sum(), table)
    (expected,) = torch.autograd.grad((table[INDEX] * weights).sum(), table)
    torch.testing.assert_close(found, expected)
    assert bool((found[1] == 0).all())


def test_stacked_tables_share_the_index() -> None:
    table, weights = tables(2)
    rows = RowPicker(INDEX, 4)
    picked = torch.vmap(rows.of)(table)
    assert torch.equal(picked, table[:, INDEX])
    (found,) = torch.autograd.grad((picked * weights).sum(), table)
    (expected,) = torch.autograd.grad((table[:, INDEX] * weights).sum(), table)
    torch.testing.assert_close(found, expected)


def test_a_bfloat16_gradient_stays_bfloat16() -> None:
    table = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    RowPicker(INDEX, 4).of(table).sum().backward()
    assert table.grad is not None
    assert table.grad.dtype == torch.bfloat16
    assert table.grad[:, 0].tolist() == [2, 0, 3, 1]
