"""The kernels as operators that autograd, `torch.compile` and the profiler know, one launch each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egopatch.train.ops.philox.reference import Draw


@torch.library.custom_op("egopatch::dropout", mutates_args=())
def dropout_kernel(
    x: Tensor, seeds: Sequence[int], place: int, position: Tensor, rows: Tensor | None, p: float
) -> Tensor:
    """`kernels.dropout` as an operator; the arguments before `p` are those of a `Draw`."""
    # Imported here, so that the reference runs without Triton.
    from egopatch.train.ops.philox import kernels

    return kernels.dropout(x, Draw(tuple(seeds), place, position, rows), p)


@dropout_kernel.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_draw(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.draw = inputs
    ctx.set_materialize_grads(False)


def _dropped_gradient(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    # Drawing the numbers again is cheaper than writing and reading them.
    return None if grad is None else dropout_kernel(grad, *ctx.draw), None, None, None, None, None


dropout_kernel.register_autograd(_dropped_gradient, setup_context=_save_draw)


@torch.library.custom_op("egopatch::uniform", mutates_args=())
def uniform_kernel(
    shape: Sequence[int],
    seeds: Sequence[int],
    place: int,
    position: Tensor,
    rows: Tensor | None,
    device: torch.device,
) -> Tensor:
    """`kernels.uniform` as an operator."""
    # Imported here, so that the reference runs without Triton.
    from egopatch.train.ops.philox import kernels

    return kernels.uniform(tuple(shape), Draw(tuple(seeds), place, position, rows), device)


@uniform_kernel.register_fake
def _(shape: Sequence[int], seeds: Sequence[int], *rest: object) -> Tensor:
    device = rest[-1]
    assert isinstance(device, torch.device)
    return torch.empty(*([len(seeds)] if len(seeds) > 1 else []), *shape, device=device)
