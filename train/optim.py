"""AdamW and its schedule, as functions of the step alone so that a resumed run needs no scheduler state."""

import math

import torch
from torch import nn

from configs.schema import TrainConfig


def build_optimiser(head: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what `head` learns; only matrices decay, so norms, biases and the spatial prior do not."""
    learned = [p for p in head.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=(0.9, 0.98))


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Rate of step 0 .. steps - 1: a linear rise to `train.lr` over the warmup's share, then a cosine to zero."""
    warmup = train.warmup * steps
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
