"""Random numbers of heads as a function of keys alone: there is no state to save, and equal keys give equal numbers.

The trainer sets the keys before each step, from the seed, the step and the place in the head. Members of a stack with
one seed draw alike, so that what else they differ in is compared on the same noise. A rank that works on a part of the
batch draws for the whole and takes its rows, so that the numbers do not depend on how many ranks there are.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from train.shares import Part

Axis = Literal["questions", "clips", "texts"]


class Noise(nn.Module):
    """Uniform numbers in [0, 1).

    Args:
        over: what the first dimension counts.

    Attributes:
        keys: one for each member of the stack that the head is run in.
        part: which rows of the whole batch are here; None is all of them.
        member: scalar, which of them this is. Within a stack it tells `vmap` that the numbers are each member's own.
    """

    member: Tensor

    def __init__(self, over: Axis = "questions") -> None:
        super().__init__()
        self.over = over
        self.part: Part | None = None
        self.keys: tuple[int, ...] = (0,)
        self.register_buffer("member", torch.zeros(()), persistent=False)

    def forward(self, like: Tensor) -> Tensor:
        """float32 in the shape of `like`."""
        return _Draw.apply(like.detach(), self.member, self.keys, self.part)


class Dropout(Noise):
    """Dropout of probability `p` while training."""

    def __init__(self, p: float, over: Axis = "questions") -> None:
        super().__init__(over)
        self.p = p

    def forward(self, like: Tensor) -> Tensor:
        """`like` with a share of its entries zero and the others scaled up."""
        if not self.training or self.p == 0:
            return like
        return like * ((super().forward(like) >= self.p) / (1 - self.p)).to(like.dtype)


def mix(*numbers: int) -> int:
    """A key of several numbers; unlike numbers give unlike keys, near enough."""
    key = 0
    for number in numbers:
        # Steps of SplitMix64, whose output bits all depend on all input bits.
        key = (key + number + 0x9E3779B97F4A7C15) % 2**64
        key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        key = ((key ^ key >> 27) * 0x94D049BB133111EB) % 2**64
        key ^= key >> 31
    return key >> 1


class _Draw(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(like: Tensor, member: Tensor, keys: tuple[int, ...], part: Part | None) -> Tensor:
        (key,) = keys
        return _uniform(like.shape, key, like.device, part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None, None, None]:
        return None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        like: Tensor,
        member: Tensor,
        keys: tuple[int, ...],
        part: Part | None,
    ) -> tuple[Tensor, int]:
        shape = list(like.shape)
        if in_dims[0] is not None:
            del shape[in_dims[0]]
        drawn = {key: _uniform(torch.Size(shape), key, like.device, part) for key in dict.fromkeys(keys)}
        return torch.stack([drawn[key] for key in keys]), 0


def _uniform(shape: torch.Size, key: int, device: torch.device, part: Part | None) -> Tensor:
    generator = torch.Generator(device).manual_seed(key)
    if part is None:
        return torch.rand(shape, generator=generator, device=device)
    return torch.rand((part.of, *shape[1:]), generator=generator, device=device)[part.rows.to(device)]
