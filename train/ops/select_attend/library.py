"""Operators of both implementations, known to autograd and to `torch.compile`.

Each forward returns pooled, lse, kept and what its backward needs: the softmax weights [B, T, H, k] for the
reference; the mask of kept patches [B, T, N] and the grouping of questions by clip for Triton, whose module is
imported when its operator first runs, so that the reference works where Triton is not installed.
"""

from typing import Any

import torch
from torch import Tensor

from train.ops.select_attend import reference
from train.ops.select_attend.schedule import tile_bound


@torch.library.custom_op("egopatch::select_attend_reference", mutates_args=())
def reference_forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.forward` as an operator."""
    return reference.forward(tokens, clip_index, queries, selector, bias, k, scale)


@reference_forward.register_fake
def _(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    frames, width = tokens.shape[1], tokens.shape[3]
    questions, heads, _ = queries.shape
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return (
        queries.new_empty(questions, frames, heads, width),
        queries.new_empty(questions, frames, heads, dtype=dtype),
        clip_index.new_empty(questions, frames, k, dtype=torch.int64),
        queries.new_empty(questions, frames, heads, k, dtype=dtype),
    )


@torch.library.custom_op("egopatch::select_attend_reference_backward", mutates_args=())
def reference_backward(
    grad_pooled: Tensor,
    grad_lse: Tensor,
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    kept: Tensor,
    weights: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.backward` as an operator."""
    return reference.backward(grad_pooled, grad_lse, tokens, clip_index, queries, kept, weights, scale)


@reference_backward.register_fake
def _(
    grad_pooled: Tensor,
    grad_lse: Tensor,
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    kept: Tensor,
    weights: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    questions, heads, width = queries.shape
    return (
        weights.new_empty(questions, heads, width),
        weights.new_empty(questions, width),
        weights.new_empty(tokens.shape[:3]),
    )


def _reference_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, clip_index, queries, selector, bias, _, scale = inputs
    _, lse, kept, weights = output
    ctx.mark_non_differentiable(kept, weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, clip_index, queries, kept, weights, scale)
    ctx.lse_shape = lse.shape
    ctx.dtypes = (queries.dtype, selector.dtype, bias.dtype)


def _reference_gradients(
    ctx: Any, grad_pooled: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    tokens, clip_index, queries, kept, weights, scale = ctx.saved_tensors
    if grad_pooled is None:
        grad_pooled = queries.new_zeros(*ctx.lse_shape, queries.shape[-1])
    if grad_lse is None:
        grad_lse = weights.new_zeros(ctx.lse_shape)
    grads = reference_backward(grad_pooled, grad_lse, tokens, clip_index, queries, kept, weights, scale)
    return None, None, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


reference_forward.register_autograd(_reference_gradients, setup_context=_reference_save)


@torch.library.custom_op("egopatch::select_attend_triton", mutates_args=())
def triton_forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`triton.forward` as an operator."""
    from train.ops.select_attend import triton

    return triton.forward(tokens, clip_index, queries, selector, bias, k, scale)


@triton_forward.register_fake
def _(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    clips, frames, patches, width = tokens.shape
    questions, heads, _ = queries.shape
    return (
        queries.new_empty(questions, frames, heads, width),
        queries.new_empty(questions, frames, heads, dtype=torch.float32),
        clip_index.new_empty(questions, frames, k, dtype=torch.int64),
        clip_index.new_empty(questions, frames, patches, dtype=torch.int8),
        clip_index.new_empty(questions, dtype=torch.int32),
        clip_index.new_empty(tile_bound(questions, clips), 3, dtype=torch.int32),
        clip_index.new_empty(clips + 1, dtype=torch.int32),
    )


@torch.library.custom_op("egopatch::select_attend_triton_backward", mutates_args=())
def triton_backward(
    grad_pooled: Tensor,
    grad_lse: Tensor,
    tokens: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    lse: Tensor,
    mask: Tensor,
    order: Tensor,
    tiles: Tensor,
    clip_tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton.backward` as an operator."""
    from train.ops.select_attend import triton

    return triton.backward(
        grad_pooled, grad_lse, tokens, queries, selector, bias, scale, lse, mask, order, tiles, clip_tiles
    )


@triton_backward.register_fake
def _(
    grad_pooled: Tensor,
    grad_lse: Tensor,
    tokens: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    lse: Tensor,
    mask: Tensor,
    order: Tensor,
    tiles: Tensor,
    clip_tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    questions, heads, width = queries.shape
    return (
        lse.new_empty(questions, heads, width),
        lse.new_empty(questions, width),
        lse.new_empty(tokens.shape[:3]),
    )


def _triton_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, _, queries, selector, bias, _, scale = inputs
    _, lse, kept, *saved = output
    ctx.mark_non_differentiable(kept, *saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, queries, selector, bias, scale, lse, *saved)


def _triton_gradients(
    ctx: Any, grad_pooled: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    tokens, queries, selector, bias, scale, lse, *saved = ctx.saved_tensors
    if grad_pooled is None:
        grad_pooled = queries.new_zeros(*lse.shape, queries.shape[-1])
    if grad_lse is None:
        grad_lse = torch.zeros_like(lse)
    grads = triton_backward(grad_pooled, grad_lse, tokens, queries, selector, bias, scale, lse, *saved)
    dtypes = (queries.dtype, selector.dtype, bias.dtype)
    return None, None, *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)), None, None


triton_forward.register_autograd(_triton_gradients, setup_context=_triton_save)
