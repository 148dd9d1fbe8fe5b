"""The form in which a store writes each dtype to disk, and the bytes of a row."""

import math
from dataclasses import dataclass

import numpy as np

from egopatch.features.values.errors import StoreError
from egopatch.features.values.spec import ArraySpec, StoreSpec


@dataclass(frozen=True)
class DiskDtype:
    """One dtype as it is written to disk.

    Attributes:
        numpy: NumPy dtype in the files, with the same width. Zarr and HDF5 know neither bfloat16 nor float8, so those
            are written as integers with the same bits.
        fill_value: Value that other tools read for a row that was never written; NaN where the dtype has one.
    """

    numpy: str
    fill_value: float | int | bool


DISK_DTYPES = {
    "float16": DiskDtype("<f2", float("nan")),
    "float32": DiskDtype("<f4", float("nan")),
    "bfloat16": DiskDtype("<u2", 0x7FC0),
    "float8_e4m3": DiskDtype("|u1", 0x7F),
    "int8": DiskDtype("|i1", -128),
    "int16": DiskDtype("<i2", -1),
    "bool": DiskDtype("|b1", False),
}


# Bits of infinity, and bytes of a number; float8_e4m3 has no infinity, and NaN in its place.
_INFINITIES = {
    "float64": (0x7FF0000000000000, 8),
    "float32": (0x7F800000, 4),
    "float16": (0x7C00, 2),
    "bfloat16": (0x7F80, 2),
    "float8_e4m3": (0x7F, 1),
}


def are_finite(content: np.ndarray, dtype: str) -> bool:
    """Whether all numbers of `dtype` in contiguous bytes are finite; always true for integers.

    Seen as integers, numbers that are not finite are the largest of each sign, and the largest integer is found at the
    speed of memory; torch takes 50 times longer to find the largest float16.
    """
    if dtype not in _INFINITIES or not content.size:
        return True
    infinity, width = _INFINITIES[dtype]
    content = content.reshape(-1)
    positive, negative = content.view(f"i{width}").max(), content.view(f"u{width}").max()
    return int(positive) < infinity and int(negative) < infinity + (1 << 8 * width - 1)


def disk_dtype(dtype: str) -> DiskDtype:
    """The form of `dtype` on disk.

    Raises:
        StoreError: No store can hold this dtype.
    """
    if dtype not in DISK_DTYPES:
        raise StoreError(f"array dtype {dtype!r} is unknown; expected one of {', '.join(DISK_DTYPES)}")
    return DISK_DTYPES[dtype]


def row_bytes(array: ArraySpec) -> int:
    """Bytes in one row of `array`."""
    return math.prod(array.shape) * np.dtype(disk_dtype(array.dtype).numpy).itemsize


def spec_row_bytes(spec: StoreSpec) -> int:
    """Bytes in one row of every array together."""
    return sum(row_bytes(array) for array in spec.arrays)
