"""Helpers for operations of M stacked heads: one call for all heads under `torch.vmap`, and numbers on the device."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def for_all_heads(call: Callable[..., Any], *inputs: Tensor) -> Any:
    """Under a `vmap` over M heads, run `call` once for all of them, instead of letting `vmap` transform it.

    Args:
        call: Receives `inputs` stacked, and returns tensors [M, ...]; it may use tensors that all heads share.
        inputs: Tensors of a head, at least one of which `vmap` maps.
    """
    return _UnderVmap.apply(call, *inputs)


class _UnderVmap(torch.autograd.Function):
    """Never runs outside `vmap`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("what is done for all heads at once runs only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Any]:
        stacked = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(inputs, in_dims[1:], strict=True)
        ]
        out = call(*stacked)
        return out, (0,) * len(out) if isinstance(out, tuple) else 0


@cache
def on_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tuple of numbers as a tensor, copied once: a copy in every step would make the host wait for the GPU."""
    return torch.tensor(numbers, dtype=dtype, device=device)
