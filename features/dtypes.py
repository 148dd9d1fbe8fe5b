"""How each dtype of a store lies on disk."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from features.errors import StoreError
from features.spec import ArraySpec, StoreSpec


@dataclass(frozen=True)
class Stored:
    """One dtype on disk.

    Attributes:
        torch: as it is read.
        disk: as Zarr and HDF5 keep it, of the same width; types that they lack are kept as the integers of their bits.
        absent: what a row that was never written reads as with other tools; a NaN wherever the dtype has one.
    """

    torch: torch.dtype
    disk: str
    absent: float | int | bool


STORED = {
    "float16": Stored(torch.float16, "<f2", float("nan")),
    "float32": Stored(torch.float32, "<f4", float("nan")),
    "bfloat16": Stored(torch.bfloat16, "<u2", 0x7FC0),
    "float8_e4m3": Stored(torch.float8_e4m3fn, "|u1", 0x7F),
    "int8": Stored(torch.int8, "|i1", -128),
    "int16": Stored(torch.int16, "<i2", -1),
    "bool": Stored(torch.bool, "|b1", False),
}


def stored(dtype: str) -> Stored:
    """How `dtype` is kept.

    Raises:
        StoreError: the store has no such dtype.
    """
    if dtype not in STORED:
        raise StoreError(f"array dtype {dtype!r} is unknown; expected one of {', '.join(STORED)}")
    return STORED[dtype]


def row_bytes(array: ArraySpec) -> int:
    """Bytes of one row."""
    return math.prod(array.shape) * np.dtype(stored(array.dtype).disk).itemsize


def spec_bytes(spec: StoreSpec) -> int:
    """Bytes of one row of every array."""
    return sum(row_bytes(array) for array in spec.arrays)


def to_disk(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """The tensor's bits as the array that is written. `tensor` has the stored dtype already."""
    flat = tensor.detach().cpu().contiguous()
    return bytes_of(flat).view(np.dtype(stored(dtype).disk)).reshape(tuple(flat.shape))


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor's memory as writable bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
