"""Deletion and insertion: how a head's answer depends on the patches that a score ranks first.

Deletion replaces the patches of every frame by an average patch, those with the highest score first; insertion starts
with average patches only and puts them back in the same order. Where the score says what matters, the probability of
the head's answer falls fast and rises fast: a small area below the deletion curve, a large one below the insertion
curve. Source: V. Petsiuk, A. Das, K. Saenko, RISE, BMVC 2018.

Shape legend: B questions, T frames, N patches a frame, S shares, P sets of present patches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Shares of the patches of a frame that are deleted or inserted.
SHARES = tuple(step / 10 for step in range(11))


def curves(
    probability: Callable[[Tensor], Tensor], scores: Tensor, shares: Sequence[float] = SHARES
) -> tuple[Tensor, Tensor]:
    """The deletion and the insertion curve of each question, [S, B] each.

    Args:
        probability: Maps the patches that are present [P, B, T, N] bool to the probability of each answer [P, B].
        scores: [B, T, N]. Ties go to the lowest index.
        shares: Shares of the patches of each frame, rising from 0 to 1.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=order.device).expand_as(order)
    )
    counts = [round(share * scores.shape[-1]) for share in shares]
    present = torch.stack([rank >= count for count in counts] + [rank < count for count in counts])
    deletion, insertion = probability(present).split(len(counts))
    return deletion, insertion


def area(curve: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """Area below curves [S, ...] by the trapezoidal rule: the mean height over shares."""
    return torch.trapezoid(curve, torch.tensor(shares, dtype=curve.dtype, device=curve.device), dim=0)
