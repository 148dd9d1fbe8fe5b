"""The entry point: validates its arguments, chooses an implementation and calls it.

Shape legend: C clips, S clips that `tokens` holds, B questions, T frames, N patches a frame, D channels, H attention
heads, k kept patches a frame, M stacked heads.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from egopatch.train.ops.select_attend import library
from egopatch.train.ops.select_attend.plan import Implementation, choose_implementation

TOKEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8)


class SelectAttendOutput(NamedTuple):
    """The result for B questions.

    Attributes:
        pooled: [B, T, H, D], weighted sum of the kept tokens, in the queries' dtype; the kernels order it by head in
            memory.
        lse: [B, T, H] float32 (float64 for float64 queries), log of the softmax's denominator.
        kept: [B, T, k] int64, indices of the kept patches in rising order.
    """

    pooled: Tensor
    lse: Tensor
    kept: Tensor


def select_attend(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None = None,
    implementation: Implementation = "auto",
    clip_rows: Tensor | None = None,
) -> SelectAttendOutput:
    """Keep the k best patches of every frame for each question and attend over them.

    With x = tokens * scale (row clip_rows[c] of it, if clip_rows is given), question b and its clip c = clip_index[b]:

        s[b,t,n]   = <selector_b, x[c,t,n]> + bias[c,t,n]
        kept[b,t]  = the k largest of s[b,t,:], ties to the lowest n
        a[b,h,t,n] = <queries_bh, x[c,t,n]> + s[b,t,n]        on kept n
        pooled     = sum over kept n of softmax(a) x;  lse = logsumexp(a)

    The caller absorbs the projections of ordinary attention (queries = q W_k^T / sqrt(d)), so that a token is both key
    and value. A patch with s = -inf has weight 0 even if it is among the k; a frame with only such patches gives
    pooled 0, lse -inf and gradient 0.

    Args:
        tokens: [C, T, N, D], or [S, T, N, D] with clip_rows. Frozen: float16, bfloat16, float32, float8_e4m3fn or
            int8. Never gets a gradient.
        clip_index: [B] int32 or int64, the clip of each question; clips may repeat or have no question.
        queries: [B, H, D] floating point. float64 makes the reference compute in float64.
        selector: [B, D] floating point.
        bias: [C, T, N] floating point, -inf to exclude a patch.
        k: Number of patches to keep in each frame, 1 to N.
        scale: [C, T, N], or [S, T, N] with clip_rows: floating point factor of each patch of quantised tokens.
        implementation: `auto` runs Triton on CUDA tensors that the kernels support, and the reference otherwise;
            `choose_implementation` returns the choice and the reason.
        clip_rows: [C] int32 or int64, row of `tokens` and `scale` that holds each clip, so that a batch can be read in
            place from the tokens of all clips.

    Returns:
        `SelectAttendOutput`. Gradients reach queries, selector and bias through pooled and lse.

    Raises:
        ValueError: A shape, dtype, device or value is wrong, or the implementation cannot run here; the message names
            the argument.
    """
    floats = _given(queries=queries, selector=selector, bias=bias, scale=scale)
    indices = _given(clip_index=clip_index, clip_rows=clip_rows)
    _check_dtypes(tokens, floats, indices)
    _check_shapes(tokens, floats, indices, k)
    for name, tensor in {**floats, **indices}.items():
        if tensor.device != tokens.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {tokens.device}, where tokens is")
    chosen, reason = choose_implementation(tokens, queries.dtype, implementation)
    if chosen == "triton":
        ks = torch.full((len(bias),), k, dtype=torch.int32, device=tokens.device)
        pooled, lse, kept, *_ = library.triton_forward(
            tokens, clip_index, queries, selector, bias, ks, k, scale, clip_rows, stacked=1, dtype=queries.dtype
        )
        pooled, lse = _by_question(pooled).squeeze(0), _by_question(lse).squeeze(0)
    else:
        if implementation == "auto" and tokens.is_cuda and not torch.compiler.is_compiling():
            warnings.warn(f"select_attend runs its slower reference on a GPU: {reason}", stacklevel=2)
        pooled, lse, kept, _ = library.reference_forward(
            tokens, clip_index, queries, selector, bias, k, scale, clip_rows
        )
    return SelectAttendOutput(pooled, lse, kept)


def attend_stacked(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    ks: Tensor,
    scale: Tensor | None = None,
    clip_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_attend` by the kernels for M stacked heads that share the tokens and the questions, in one launch.

    The heads become further clips and questions: the M copies of a clip follow each other, so that the programs which
    read a frame run at about the same time, and read it from the GPU's cache.

    Args:
        tokens, clip_index, scale, clip_rows: As in `select_attend`.
        queries: [M, B, H, D].
        selector: [M, B, D].
        bias: [M, C, T, N].
        ks: [M] int32, the number of patches that each head keeps, 1 to N.

    Returns:
        pooled [M, B, T, H, D], in autocast's dtype where that is on, because products read it; lse [M, B, T, H]; and
        the mask of the kept patches [M, B, T, N] bool.
    """
    stacked, clips = bias.shape[:2]
    index, rows = clip_index, clip_rows
    if stacked > 1:
        number = torch.arange(stacked, device=tokens.device)
        index = (clip_index * stacked + number[:, None]).flatten()
        rows = torch.arange(clips, device=tokens.device) if clip_rows is None else clip_rows
        rows = rows.repeat_interleave(stacked)
    device = tokens.device.type
    pooled, lse, _, mask, *_ = library.triton_forward(
        tokens,
        index,
        queries.flatten(0, 1),
        selector.flatten(0, 1),
        bias.transpose(0, 1).flatten(0, 1),
        ks.repeat(clips),
        0,
        scale,
        rows,
        stacked,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype,
    )
    kept = mask[..., : tokens.shape[2]].view(torch.bool).unflatten(0, (stacked, len(clip_index)))
    return _by_question(pooled), _by_question(lse), kept


def _by_question(x: Tensor) -> Tensor:
    """[M, H, B, T, ...], as the kernels write it, as [M, B, T, H, ...]."""
    return x.movedim(1, 3)


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _check_dtypes(tokens: Tensor, floats: dict[str, Tensor], indices: dict[str, Tensor]) -> None:
    if tokens.dtype not in TOKEN_DTYPES:
        raise ValueError(f"tokens is {tokens.dtype}; expected one of {', '.join(map(str, TOKEN_DTYPES))}")
    if tokens.requires_grad:
        raise ValueError("tokens requires a gradient; select_attend reads frozen tokens: pass tokens.detach()")
    for name, tensor in indices.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {tensor.dtype}; expected int32 or int64")
    for name, tensor in floats.items():
        if not (tensor.is_floating_point() and tensor.element_size() >= 2):
            raise ValueError(f"{name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")


def _check_shapes(tokens: Tensor, floats: dict[str, Tensor], indices: dict[str, Tensor], k: int) -> None:
    if tokens.ndim != 4:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected [clips, frames, patches, channels]")
    stored, frames, patches, width = tokens.shape
    for name, of in (("clip_index", "questions"), ("clip_rows", "clips")):
        if name in indices and indices[name].ndim != 1:
            raise ValueError(f"{name} has shape {tuple(indices[name].shape)}; expected [{of}]")
    questions = len(indices["clip_index"])
    clips = len(indices.get("clip_rows", tokens))
    queries = floats["queries"]
    if queries.ndim != 3 or queries.shape[0] != questions or queries.shape[2] != width or queries.shape[1] < 1:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)}; expected [{questions}, heads, {width}] "
            f"beside clip_index [{questions}] and tokens {tuple(tokens.shape)}"
        )
    expected = {
        "selector": (questions, width), "bias": (clips, frames, patches), "scale": (stored, frames, patches)
    }  # fmt: skip
    for name, shape in expected.items():
        if name in floats and floats[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(floats[name].shape)}; expected {tuple(shape)}")
    if k < 1 or k > patches:
        raise ValueError(f"k is {k}; expected 1 to {patches}, the patches of a frame")
