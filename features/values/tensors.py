"""Stored dtypes in torch, and conversion between tensors and bytes."""

import numpy as np
import torch

from egopatch.features.values.dtypes import disk_dtype

_TORCH = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int16": torch.int16,
    "bool": torch.bool,
}


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype for one of the dtypes in `features.values.dtypes`."""
    return _TORCH[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype, as in `features.values.dtypes` where a store can have it."""
    return next((name for name, found in _TORCH.items() if found == dtype), str(dtype).removeprefix("torch."))


def to_disk(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """The array to write, with the bits of `tensor`, which has the stored dtype already."""
    flat = tensor.detach().cpu().contiguous()
    return bytes_of(flat).view(np.dtype(disk_dtype(dtype).numpy)).reshape(tuple(flat.shape))


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as writable bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
