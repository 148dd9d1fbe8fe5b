"""A clip's tensors, checked and encoded as the rows of a store; the spec may ask for quantisation."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from egopatch.features.values.dtypes import are_finite
from egopatch.features.values.errors import NotFinite, StoreError
from egopatch.features.values.spec import ArraySpec, StoreSpec
from egopatch.features.values.tensors import bytes_of, dtype_name, to_disk, torch_dtype

_LARGEST = {"int8": 127.0, "float8_e4m3": 448.0}


def check_names(clip: str, tensors: Mapping[str, Tensor], spec: StoreSpec) -> None:
    """Refuse a clip with a missing or an unknown array; `scale` may be missing, since `encode_row` can compute it.

    Raises:
        StoreError: The arrays do not match the spec, or one is not a torch tensor; the message names the clip and the
            arrays.
    """
    expected = {array.name for array in spec.arrays}
    if tensors.keys() != expected and tensors.keys() != expected - {"scale"}:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise StoreError(f"clip {clip!r} comes with {found}; expected {', '.join(sorted(expected))}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise StoreError(f"clip {clip!r}: {name} is of type {kind}; expected a tensor: torch.as_tensor({name})")


def encode_row(clip: str, tensors: Mapping[str, Tensor], array: ArraySpec, spec: StoreSpec) -> np.ndarray:
    """The row of `array` for one clip, as it is written; the caller must check that it is finite: `dtypes.are_finite`.

    Raises:
        StoreError: The tensor has another shape or dtype, or must be converted and holds NaN or infinity; the message
            names clip and array.
    """
    if array.name == "scale" and "scale" not in tensors:
        return to_disk(scale_of(_checked(clip, tensors["patches"], spec.array("patches")), spec), array.dtype)
    target, tensor = torch_dtype(array.dtype), tensors[array.name]
    # Without a scale, patches are the tokens themselves, whatever their dtype.
    is_token = array.name == "patches" and array.dtype in _LARGEST and "scale" not in tensors
    if tensor.dtype == target and not is_token:
        return to_disk(_shaped(clip, tensor, array), array.dtype)
    tensor = _checked(clip, tensor, array)
    if is_token:
        return to_disk(quantise(tensor, scale_of(tensor, spec), array.dtype), array.dtype)
    if not target.is_floating_point:
        raise StoreError(f"clip {clip!r}: {array.name} has dtype {tensor.dtype}; expected {target}")
    return to_disk(tensor.to(target), array.dtype)


def is_stored_as_is(tensors: Mapping[str, Tensor], array: ArraySpec) -> bool:
    """Whether a clip comes with `array` in the dtype of the store."""
    return array.name in tensors and tensors[array.name].dtype == torch_dtype(array.dtype)


def not_finite(clip: str, tensors: Mapping[str, Tensor], array: ArraySpec) -> NotFinite:
    """The error for a row of `encode_row` that holds NaN or infinity."""
    found = tensors.get(array.name)
    converted = found is not None and found.dtype != torch_dtype(array.dtype)
    what = f"exceeds the range of {array.dtype}" if converted else "holds NaN or infinity"
    return NotFinite(f"clip {clip!r}: {array.name} {what}; it is not stored")


def scale_of(patches: Tensor, spec: StoreSpec) -> Tensor:
    """[T, N] factor of each patch, which maps its largest channel to the largest number of the stored dtype."""
    scale = patches.float().abs().amax(dim=-1) / _LARGEST[spec.array("patches").dtype]
    return torch.where(scale > 0, scale, torch.ones_like(scale))  # the scale of the smallest numbers rounds to 0


def quantise(patches: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """`patches` divided by `scale` and rounded to the stored dtype."""
    scaled = patches.float() / scale.unsqueeze(-1)
    limit = _LARGEST[dtype]
    return (scaled.round() if dtype == "int8" else scaled).clamp(-limit, limit).to(torch_dtype(dtype))


def dequantise(patches: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored patches [..., T, N, D] multiplied by their scale, and rounded to `dtype` once."""
    # A small scale has few digits as a float16, and torch multiplies no float8.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return patches.to(wide).mul_(scale.to(wide).unsqueeze(-1)).to(dtype)


def reconstruction_error(tensors: Mapping[str, Tensor], spec: StoreSpec) -> float | None:
    """Relative root mean square error that quantising the patches causes; None where they are not quantised here."""
    array = spec.array("patches") if spec.kind == "patches" else None
    if array is None or array.dtype not in _LARGEST or "scale" in tensors:
        return None
    original = tensors["patches"].float()
    scale = scale_of(original, spec)
    error = dequantise(quantise(original, scale, array.dtype), scale, torch.float32) - original
    size = float(original.square().mean().sqrt())
    return float(error.square().mean().sqrt()) / size if size else 0.0


def _checked(clip: str, tensor: Tensor, array: ArraySpec) -> Tensor:
    """The tensor on the CPU, checked to be finite."""
    tensor = _shaped(clip, tensor, array)
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise NotFinite(f"clip {clip!r}: {array.name} holds NaN or infinity; it is not stored")
    return tensor


def array_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of an array of one clip that holds NaN or infinity; None if no array does."""
    floating = (name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor))
    return next(floating, None)


def _is_finite(tensor: Tensor) -> bool:
    return are_finite(bytes_of(tensor.contiguous()), dtype_name(tensor.dtype))


def _shaped(clip: str, tensor: Tensor, array: ArraySpec) -> Tensor:
    if tuple(tensor.shape) != array.shape:
        raise StoreError(f"clip {clip!r}: {array.name} has shape {tuple(tensor.shape)}; expected {array.shape}")
    return tensor.detach().cpu()
