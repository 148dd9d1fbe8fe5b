"""The k largest scores of a row, with equal scores going to the lowest index."""

import torch
from torch import Tensor


def largest_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension in rising order, [..., k]."""
    n = scores.shape[-1]
    if k >= n:
        return torch.arange(n, device=scores.device).expand(scores.shape).contiguous()
    return _largest(scores, k).sort(dim=-1).values


def largest_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest along the last dimension, in the shape of `scores`."""
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, _largest(scores, k), True)


def _largest(scores: Tensor, k: int) -> Tensor:
    top = torch.topk(scores, k, dim=-1, sorted=False)
    indices = top.indices
    # topk picks any of the equal scores at the threshold. The slower sort runs only on rows that leave a choice.
    tied = (scores >= top.values.amin(dim=-1, keepdim=True)).sum(dim=-1) > k
    if bool(tied.any()):
        indices[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return indices
