"""AdamW and its schedule, as functions of the step alone so that a resumed run needs no scheduler state."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from egopatch.configs.schema import TrainConfig


def build_optimiser(stacked: Sequence[Tensor], train: TrainConfig) -> torch.optim.AdamW | None:
    """AdamW over `stacked` [M, ...] parameters; only matrices decay, so norms, biases and the spatial prior do not.

    None where there is nothing to learn.
    """
    groups = [
        {"params": [p for p in stacked if p.ndim > 2], "weight_decay": train.weight_decay},
        {"params": [p for p in stacked if p.ndim <= 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One pass over memory instead of one an operation.
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.98), fused=True) if groups else None


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Rate of step 0 .. steps - 1: a linear rise to `train.lr` over the warmup's share, then a cosine to zero."""
    warmup = train.warmup * steps
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
