"""The one entry point: checks its arguments once and dispatches.

Shape legend: C clips, B questions, T frames, N patches a frame, D channels, H attention heads, k kept patches a frame.
"""

import importlib.util
import os
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from train.ops.select_attend import library

Implementation = Literal["auto", "reference", "triton"]

TOKEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8)
# Limits that the kernels' configurations are checked for; with more patches registers spill.
TRITON_MAX_PATCHES = 256
TRITON_MAX_PATCHES_FLOAT32 = 128
TRITON_MAX_WIDTH = 1024


class SelectAttendOutput(NamedTuple):
    """What one pass gives for B questions.

    Attributes:
        pooled: [B, T, H, D], weighted sum of the kept tokens, in the queries' dtype.
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
) -> SelectAttendOutput:
    """Keep the k best patches of every frame for each question and attend over them.

    With x = tokens * scale, question b and its clip c = clip_index[b]:

        s[b,t,n]   = <selector_b, x[c,t,n]> + bias[c,t,n]
        kept[b,t]  = the k largest of s[b,t,:], ties to the lowest n
        a[b,h,t,n] = <queries_bh, x[c,t,n]> + s[b,t,n]        on kept n
        pooled     = sum over kept n of softmax(a) x;  lse = logsumexp(a)

    The projections of ordinary attention are absorbed by the caller (queries = q W_k^T / sqrt(d)), so that a token is
    both key and value. A patch whose s is -inf weighs nothing even where it is among the k; a frame with nothing else
    gives pooled 0, lse -inf and gradient 0.

    Args:
        tokens: [C, T, N, D], frozen: float16, bfloat16, float32, float8_e4m3fn or int8. Never gets a gradient.
        clip_index: [B] int32 or int64, which clip each question reads; clips may repeat or be absent.
        queries: [B, H, D] floating point. float64 makes the reference compute in float64.
        selector: [B, D] floating point.
        bias: [C, T, N] floating point, -inf to leave a patch out.
        k: patches to keep in each frame, 1 to N.
        scale: [C, T, N] floating point factor of each patch, where the tokens are quantised.
        implementation: `auto` takes Triton for CUDA tensors of up to 256 patches (128 in
            float32) and 1024 channels, and the reference elsewhere.

    Returns:
        `SelectAttendOutput`. Gradients reach queries, selector and bias through pooled and lse.

    Raises:
        ValueError: a shape, dtype, device or value is wrong, or the implementation cannot run here; the message names
            the argument.
    """
    _check_dtypes(tokens, clip_index, queries, selector, bias, scale)
    _check_shapes(tokens, clip_index, queries, selector, bias, k, scale)
    _check_devices(tokens, clip_index, queries, selector, bias, scale)
    if choose_implementation(tokens, implementation) == "triton":
        _check_triton(tokens, queries)
        pooled, lse, kept, *_ = library.triton_forward(tokens, clip_index, queries, selector, bias, k, scale)
    else:
        pooled, lse, kept, _ = library.reference_forward(tokens, clip_index, queries, selector, bias, k, scale)
    return SelectAttendOutput(pooled, lse, kept)


def choose_implementation(tokens: Tensor, implementation: Implementation) -> Literal["reference", "triton"]:
    """Which implementation `select_attend` runs for these tokens, so that a run can log it.

    Raises:
        ValueError: `implementation` is not one of the three.
    """
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(f"implementation is {implementation!r}; expected 'auto', 'reference' or 'triton'")
    if implementation == "auto":
        fits = tokens.ndim == 4 and tokens.shape[2] <= _most_patches(tokens) and tokens.shape[3] <= TRITON_MAX_WIDTH
        return "triton" if tokens.is_cuda and fits and _triton_installed() else "reference"
    return implementation


def _most_patches(tokens: Tensor) -> int:
    return TRITON_MAX_PATCHES_FLOAT32 if tokens.dtype == torch.float32 else TRITON_MAX_PATCHES


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_dtypes(
    tokens: Tensor, clip_index: Tensor, queries: Tensor, selector: Tensor, bias: Tensor, scale: Tensor | None
) -> None:
    if tokens.dtype not in TOKEN_DTYPES:
        raise ValueError(f"tokens is {tokens.dtype}; expected one of {', '.join(map(str, TOKEN_DTYPES))}")
    if tokens.requires_grad:
        raise ValueError("tokens requires a gradient; select_attend reads frozen tokens: pass tokens.detach()")
    if clip_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"clip_index is {clip_index.dtype}; expected int32 or int64")
    for name, tensor in (("queries", queries), ("selector", selector), ("bias", bias), ("scale", scale)):
        if tensor is not None and not (tensor.is_floating_point() and tensor.element_size() >= 2):
            raise ValueError(f"{name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")


def _check_shapes(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
) -> None:
    if tokens.ndim != 4:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected [clips, frames, patches, channels]")
    if clip_index.ndim != 1:
        raise ValueError(f"clip_index has shape {tuple(clip_index.shape)}; expected [questions]")
    clips, frames, patches, width = tokens.shape
    questions = clip_index.shape[0]
    if queries.ndim != 3 or queries.shape[0] != questions or queries.shape[2] != width or queries.shape[1] < 1:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)}; expected [{questions}, heads, {width}] "
            f"beside clip_index [{questions}] and tokens {tuple(tokens.shape)}"
        )
    expected = {"selector": (selector, (questions, width)), "bias": (bias, (clips, frames, patches))}
    if scale is not None:
        expected["scale"] = (scale, (clips, frames, patches))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if k < 1 or k > patches:
        raise ValueError(f"k is {k}; expected 1 to {patches}, the patches of a frame")


def _check_devices(
    tokens: Tensor, clip_index: Tensor, queries: Tensor, selector: Tensor, bias: Tensor, scale: Tensor | None
) -> None:
    others = (
        ("clip_index", clip_index), ("queries", queries), ("selector", selector), ("bias", bias), ("scale", scale)
    )  # fmt: skip
    for name, tensor in others:
        if tensor is not None and tensor.device != tokens.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {tokens.device}, where tokens is")


def _check_triton(tokens: Tensor, queries: Tensor) -> None:
    if not _triton_installed():
        raise ValueError("implementation is 'triton' but Triton is not installed; pip install triton, or use 'auto'")
    if not tokens.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"tokens is on {tokens.device}; expected a CUDA device with 'triton', or use 'auto'")
    if queries.dtype == torch.float64:
        raise ValueError("queries is torch.float64; expected at most float32 with 'triton', or use 'reference'")
    if tokens.shape[2] > _most_patches(tokens):
        raise ValueError(
            f"tokens has {tokens.shape[2]} patches of {tokens.dtype}; expected at most {_most_patches(tokens)} "
            "with 'triton': use 'auto', or float16 tokens where float32 is too many"
        )
    if tokens.shape[3] > TRITON_MAX_WIDTH or tokens.shape[3] % 16:
        raise ValueError(
            f"tokens has {tokens.shape[3]} channels; expected a multiple of 16 up to {TRITON_MAX_WIDTH} with 'triton'"
        )
    if tokens.stride(3) != 1:
        raise ValueError(f"tokens has strides {tokens.stride()}; expected 1 last with 'triton': call .contiguous()")
