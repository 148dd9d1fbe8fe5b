"""Dropout and uniform numbers of M stacked heads: on a GPU by one launch, elsewhere by NumPy, with equal results.

Shape legend: M stacked heads, R rows of a tensor. The dimension M is left out for a single head.
"""

import torch
from torch import Tensor

from egopatch.features.common.machine import triton_fault
from egopatch.train.ops.philox import reference
from egopatch.train.ops.philox.library import dropout_kernel, uniform_kernel
from egopatch.train.ops.philox.reference import Draw


def uniform(shape: tuple[int, ...], draw: Draw, device: torch.device) -> Tensor:
    """float32 in [0, 1), [M, *shape] for the shape [R, ...] of a head's tensor."""
    if _by_kernel(device):
        return uniform_kernel(list(shape), *_arguments(draw, device), device)
    return reference.uniform(shape, draw).to(device)


def dropout(x: Tensor, draw: Draw, p: float) -> Tensor:
    """`x` [M, R, ...] with entries set to zero with probability `p`, and the others scaled up.

    The probability is rounded to a multiple of 2^-16.
    """
    if _by_kernel(x.device):
        return dropout_kernel(x, *_arguments(draw, x.device), p)
    shape = x.shape[1:] if len(draw.seeds) > 1 else x.shape
    factor = reference.dropout_factor(tuple(shape), draw, p).to(x.device)
    return (x * factor).to(x.dtype)


def _by_kernel(device: torch.device) -> bool:
    # torch.compile cannot trace the look-up.
    return device.type == "cuda" and (torch.compiler.is_compiling() or triton_fault(device) is None)


def _arguments(draw: Draw, device: torch.device) -> tuple[list[int], int, Tensor, Tensor | None]:
    # torch's integers are signed.
    seeds = [(seed + 2**63) % 2**64 - 2**63 for seed in draw.seeds]
    return seeds, draw.place, draw.position.to(device), draw.rows
