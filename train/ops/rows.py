"""Rows of a table by index, with a gradient that is one product.

Shape legend: U rows of the table, B picked rows.
"""

from typing import Any

import torch
from torch import Tensor


class RowPicker:
    """Picks rows by `index` [B] long of tables with `count` = U rows.

    The gradient of torch's indexing sorts the index on a GPU, to add equal rows up in a fixed order: many launches for
    each table. Here it is the product with a matrix of zeros and ones, which all tables share.
    """

    def __init__(self, index: Tensor, count: int) -> None:
        self.index = index
        # The transpose of the matrix whose product with a table is its picked rows.
        self.one_hot = torch.zeros(count, len(index), device=index.device).scatter_(0, index[None], 1)

    def of(self, table: Tensor) -> Tensor:
        """table[index], [B, ...] for the table [U, ...]."""
        return _Pick.apply(table, self.index, self.one_hot)


class _Pick(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, index: Tensor, one_hot: Tensor) -> Tensor:
        return table[index]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, _, one_hot = inputs
        ctx.save_for_backward(one_hot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (one_hot,) = ctx.saved_tensors
        added = one_hot.to(grad.dtype) @ grad.reshape(len(grad), -1)
        return added.view(len(one_hot), *grad.shape[1:]), None, None
