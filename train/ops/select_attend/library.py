"""Both implementations as operators that autograd and `torch.compile` know.

Each forward returns pooled, lse, kept and the tensors for its backward: the softmax weights [B, T, H, k] for the
reference; the mask of kept patches, whose rows are padded, and the schedule for Triton, whose pooled and lse are
ordered differently.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from egopatch.train.ops.select_attend import reference
from egopatch.train.ops.select_attend.plan import row_pitch, tile_bound


@torch.library.custom_op("egopatch::select_attend_reference", mutates_args=())
def reference_forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
    clip_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.forward` as an operator."""
    # Autocast would round the scores to bfloat16, and so select other patches.
    with torch.autocast(tokens.device.type, enabled=False):
        return reference.forward(tokens, clip_index, queries, selector, bias, k, scale, clip_rows)


@reference_forward.register_fake
def _(
    tokens: Tensor, clip_index: Tensor, queries: Tensor, selector: Tensor, bias: Tensor, k: int, *_: Any
) -> tuple[Tensor, ...]:
    frames = tokens.shape[1]
    questions, heads, width = queries.shape
    dtype = reference.arithmetic_dtype(queries)
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
    bias: Tensor,
    kept: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    clip_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.backward` as an operator."""
    saved = (tokens, clip_index, queries, bias, kept, weights, scale, clip_rows)
    with torch.autocast(tokens.device.type, enabled=False):
        return reference.backward(grad_pooled, grad_lse, *saved)


@reference_backward.register_fake
def _(
    grad_pooled: Tensor, grad_lse: Tensor, tokens: Tensor, clip_index: Tensor, queries: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(queries, bias, reference.arithmetic_dtype(queries))


def _reference_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, clip_index, queries, selector, bias, _, scale, clip_rows = inputs
    _, lse, kept, weights = output
    ctx.mark_non_differentiable(kept, weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, clip_index, queries, selector, bias, lse, kept, weights, scale, clip_rows)


def _reference_gradients(
    ctx: Any, grad_pooled: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    tokens, clip_index, queries, selector, bias, lse, *saved = ctx.saved_tensors
    incoming = _incoming(grad_pooled, grad_lse, queries, lse)
    grads = reference_backward(*incoming, tokens, clip_index, queries, bias, *saved)
    return None, None, *_outgoing(grads, queries, selector, bias), None, None, None


reference_forward.register_autograd(_reference_gradients, setup_context=_reference_save)


@torch.library.custom_op("egopatch::select_attend_triton", mutates_args=())
def triton_forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    ks: Tensor,
    listed: int,
    scale: Tensor | None,
    clip_rows: Tensor | None,
    stacked: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kernels.forward` as an operator."""
    # Imported here, so that the reference runs without Triton.
    from egopatch.train.ops.select_attend import kernels

    with torch.cuda.device_of(tokens):  # Triton launches on the current device, whatever its arguments are on
        return kernels.forward(
            tokens, clip_index, queries, selector, bias, ks, listed, scale, clip_rows, stacked, dtype
        )


@triton_forward.register_fake
def _(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    ks: Tensor,
    listed: int,
    scale: Tensor | None,
    clip_rows: Tensor | None,
    stacked: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    frames, patches = tokens.shape[1:3]
    questions, clips = len(clip_index), len(bias)
    _, heads, width = queries.shape
    shape = (stacked, heads, questions // stacked, frames)
    return (
        queries.new_empty(*shape, width, dtype=dtype),
        queries.new_empty(shape, dtype=torch.float32),
        clip_index.new_empty(questions, frames, listed, dtype=torch.int64),
        clip_index.new_empty(questions, frames, row_pitch(patches), dtype=torch.int8),
        clip_index.new_empty(questions, dtype=torch.int32),
        clip_index.new_empty(tile_bound(questions, clips), 4, dtype=torch.int32),
        clip_index.new_empty(clips, 2, dtype=torch.int32),
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
    """`kernels.backward` as an operator."""
    # Imported here, so that the reference runs without Triton.
    from egopatch.train.ops.select_attend import kernels

    with torch.cuda.device_of(tokens):
        return kernels.backward(
            grad_pooled, grad_lse, tokens, queries, selector, bias, scale, lse, mask, order, tiles, clip_tiles
        )


@triton_backward.register_fake
def _(
    grad_pooled: Tensor, grad_lse: Tensor, tokens: Tensor, queries: Tensor, selector: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(queries, bias, torch.float32)


def _triton_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, _, queries, selector, bias, _, _, scale, *_ = inputs
    _, lse, kept, *saved = output
    ctx.mark_non_differentiable(kept, *saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, queries, selector, bias, scale, lse, *saved)


def _triton_gradients(
    ctx: Any, grad_pooled: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    tokens, queries, selector, bias, scale, lse, *saved = ctx.saved_tensors
    incoming = _incoming(grad_pooled, grad_lse, queries, lse)
    grads = triton_backward(*incoming, tokens, queries, selector, bias, scale, lse, *saved)
    return None, None, *_outgoing(grads, queries, selector, bias), *(None,) * 6


triton_forward.register_autograd(_triton_gradients, setup_context=_triton_save)


def _gradients(queries: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of queries, selector and bias."""
    questions, _, width = queries.shape
    return (
        torch.empty_like(queries, dtype=dtype, memory_format=torch.contiguous_format),
        queries.new_empty(questions, width, dtype=dtype),
        bias.new_empty(bias.shape, dtype=dtype),
    )


def _incoming(
    grad_pooled: Tensor | None, grad_lse: Tensor | None, queries: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both outputs; zeros for an output that the loss does not use."""
    if grad_pooled is None:
        grad_pooled = queries.new_zeros(*lse.shape, queries.shape[-1])
    return grad_pooled, torch.zeros_like(lse) if grad_lse is None else grad_lse


def _outgoing(
    grads: tuple[Tensor, Tensor, Tensor], queries: Tensor, selector: Tensor, bias: Tensor
) -> Iterator[Tensor]:
    """Gradients in the dtypes of the arguments that they belong to."""
    return (grad.to(leaf.dtype) for grad, leaf in zip(grads, (queries, selector, bias), strict=True))
