"""AdamW and its schedule, as functions of the step alone so that a resumed run needs no scheduler state."""

import math

import torch

from egopatch.configs.schema import TrainConfig
from egopatch.train.fitting.flat import FlatParameters


def build_optimiser(parameters: FlatParameters, train: TrainConfig) -> torch.optim.AdamW | None:
    """AdamW over the flat parameters; None where there is nothing to learn."""
    groups = [
        {"params": [flat], "weight_decay": train.weight_decay if layout.decays else 0.0}
        for flat, layout in zip(parameters.flats, parameters.layouts, strict=True)
    ]
    # One pass over memory instead of one an operation.
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.98), fused=True) if groups else None


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Rate of step 0 .. steps - 1: a linear rise to `train.lr` over the warmup's share, then a cosine to zero."""
    warmup = train.warmup * steps
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
