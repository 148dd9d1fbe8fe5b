"""Rows of a table by index, with a gradient that is one product.

Shape legend: U rows of the table, B picked rows.
"""

from typing import Any

import torch
from torch import Tensor


class Rows:
    """Picks rows by `index` [B] long of tables with `count` = U rows.

    The gradient of torch's indexing sorts the index on a GPU, to add equal rows up in a fixed order: many launches for
    each table. Here it is the product with a matrix of zeros and ones, which all tables share.
    """

    def __init__(self, index: Tensor, count: int) -> None:
        self.index = index
        # The transpose of the matrix whose product with a table is its picked rows.
        self.places = torch.zeros(count, len(index), device=index.device).scatter_(0, index[None], 1)

    def of(self, table: Tensor) -> Tensor:
        """table[index], [B, ...] for the table [U, ...]."""
        return _Pick.apply(table, self.index, self.places)


class _Pick(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, index: Tensor, places: Tensor) -> Tensor:
        return table[index]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, _, places = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        added = places.to(grad.dtype) @ grad.reshape(len(grad), -1)
        return added.view(len(places), *grad.shape[1:]), None, None
