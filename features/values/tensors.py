"""Tensors as the store keeps them: the dtypes that they have in torch, and their bytes."""

import numpy as np
import torch

from egopatch.features.values.dtypes import stored

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
    """What an array of one of the `features.values.dtypes` is read as."""
    return _TORCH[dtype]


def to_disk(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """The tensor's bits as the array that is written. `tensor` has the stored dtype already."""
    flat = tensor.detach().cpu().contiguous()
    return bytes_of(flat).view(np.dtype(stored(dtype).disk)).reshape(tuple(flat.shape))


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor's memory as writable bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
