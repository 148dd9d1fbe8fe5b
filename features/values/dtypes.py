"""How each dtype of a store lies on disk."""

import math
from dataclasses import dataclass

import numpy as np

from egopatch.features.values.errors import StoreError
from egopatch.features.values.spec import ArraySpec, StoreSpec


@dataclass(frozen=True)
class Stored:
    """One dtype on disk.

    Attributes:
        disk: as Zarr and HDF5 keep it, of the same width; types that they lack are kept as the integers of their bits.
        absent: what a row that was never written reads as with other tools; a NaN wherever the dtype has one.
    """

    disk: str
    absent: float | int | bool


STORED = {
    "float16": Stored("<f2", float("nan")),
    "float32": Stored("<f4", float("nan")),
    "bfloat16": Stored("<u2", 0x7FC0),
    "float8_e4m3": Stored("|u1", 0x7F),
    "int8": Stored("|i1", -128),
    "int16": Stored("<i2", -1),
    "bool": Stored("|b1", False),
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
