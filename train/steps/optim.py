"""Flat parameters, AdamW, and a schedule that depends only on the step, so that a resumed run needs no scheduler state.

The parameters of M stacked heads lie in a few flat tensors, which optimiser, average and clipping process whole. So one
operation replaces one for each parameter: a head has dozens, and each costs a GPU a launch.

Shape legend: M heads, P numbers of a head in a flat tensor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egopatch.configs.schema import TrainConfig

# Parameters whose size is a multiple of this come first, so that they begin at addresses that a GPU reads fastest.
ALIGNED = 64


@dataclass(frozen=True)
class Layout:
    """The parameters in one flat tensor [M, P], in order.

    Attributes:
        shapes: Shape of each parameter of one head, by name.
        decays: Whether weights decay: matrices do; norms, biases and the spatial prior do not.
    """

    shapes: Mapping[str, tuple[int, ...]]
    decays: bool

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """View of each parameter in `flat`, [M, ...], by name."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        pieces = flat.split(sizes, dim=1)
        named = zip(self.shapes.items(), pieces, strict=True)
        return {name: piece.view(len(flat), *shape) for (name, shape), piece in named}


class FlatParameters:
    """Trainable parameters of M heads.

    Args:
        stacked: [M, ...] values by name.

    Attributes:
        flats: [M, P], one for each combination of decay and dtype.
        layouts: Layout of each of `flats`.
        leaves: [M, ...] by name, views of `flats`; a step computes their gradients.
    """

    def __init__(self, stacked: Mapping[str, Tensor]) -> None:
        self._names = [name for decays in (True, False) for name in stacked if (stacked[name].ndim > 2) == decays]
        grouped: dict[tuple[bool, torch.dtype], list[str]] = {}
        for name in self._names:
            grouped.setdefault((stacked[name].ndim > 2, stacked[name].dtype), []).append(name)
        self.flats: list[Tensor] = []
        self.layouts: list[Layout] = []
        for (decays, _), names in grouped.items():
            names.sort(key=lambda name: stacked[name][0].numel() % ALIGNED != 0)
            self.layouts.append(Layout({name: tuple(stacked[name].shape[1:]) for name in names}, decays))
            self.flats.append(torch.cat([stacked[name].reshape(len(stacked[name]), -1) for name in names], dim=1))
        self.leaves = {name: view.requires_grad_() for name, view in self.views(self.flats).items()}
        # Reused in every step: on a CPU, new memory each time costs more than the gradients in it.
        self._gradients = [torch.empty_like(flat) for flat in self.flats]

    def views(self, flats: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """[M, ...] by name, of the parameters or of tensors like them, such as their gradients."""
        found: dict[str, Tensor] = {}
        for layout, flat in zip(self.layouts, flats, strict=True):
            found |= {} if flat is None else layout.views(flat)
        return found

    def flatten(self, gradients: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Gradients of the leaves as tensors like `flats`, in new memory if `flats` already have gradients."""
        found = []
        for layout, flat, own in zip(self.layouts, self.flats, self._gradients, strict=True):
            into = own if flat.grad is None else torch.empty_like(flat)
            views = layout.views(into)
            known = [torch.zeros_like(views[name]) if (g := gradients[name]) is None else g for name in views]
            # Straight to their places, whatever the order of their dimensions. Without the first dimension of a single
            # head, their memory layouts match those of the places, so a GPU copies all in one launch.
            torch._foreach_copy_(
                [view.squeeze(0) for view in views.values()], [gradient.squeeze(0) for gradient in known]
            )
            found.append(into)
        return found

    def optimiser_state(self, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """State of `optimiser` over `flats`, converted to one entry for each parameter, matrices first."""
        states = [optimiser.state.get(flat, {}) for flat in self.flats]
        moments = {key: self.views([state.get(key) for state in states]) for key in ("exp_avg", "exp_avg_sq")}
        steps = {name: state for layout, state in zip(self.layouts, states, strict=True) for name in layout.shapes}
        return {
            "state": {
                number: {"step": steps[name]["step"], **{key: views[name] for key, views in moments.items()}}
                for number, name in enumerate(self._names)
                if steps[name]
            }
        }

    def load_optimiser_state(self, optimiser: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        """Set the state of `optimiser` over `flats` from one entry for each parameter."""
        state_of = {name: saved["state"][number] for number, name in enumerate(self._names) if number in saved["state"]}
        for layout, flat in zip(self.layouts, self.flats, strict=True):
            known = [name for name in layout.shapes if name in state_of]
            if not known:
                continue
            state = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            for key, moments in state.items():
                views = layout.views(moments)
                for name in known:
                    views[name].copy_(state_of[name][key])
            optimiser.state[flat] = {"step": state_of[known[0]]["step"].to(flat.device), **state}


def build_optimiser(parameters: FlatParameters, train: TrainConfig) -> torch.optim.AdamW | None:
    """AdamW over the flat parameters; None where there is nothing to learn."""
    groups = [
        {"params": [flat], "weight_decay": train.weight_decay if layout.decays else 0.0}
        for flat, layout in zip(parameters.flats, parameters.layouts, strict=True)
    ]
    if not groups:
        return None
    # On a GPU the rate is a tensor there: a CUDA graph of a step would freeze a number.
    cuda = parameters.flats[0].is_cuda
    rate = torch.tensor(train.lr, device=parameters.flats[0].device) if cuda else train.lr
    # Fused: one pass over memory instead of one per operation.
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True, capturable=cuda)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next steps."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Rate of step 0 .. steps - 1: a linear rise to `train.lr` over the warmup's share, then a cosine to zero."""
    warmup = train.warmup * steps
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
