"""Random numbers of heads as a function of keys alone: there is no state to save, and equal keys give equal numbers.

The trainer sets the keys before each step, from the seed, the step and the place in the head. Members of a stack with
one seed draw alike, so that what else they differ in is compared on the same noise.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Noise(nn.Module):
    """Uniform numbers in [0, 1).

    Attributes:
        keys: one for each member of the stack that the head is run in.
        member: scalar, which of them this is. Within a stack it tells `vmap` that the numbers are each member's own.
    """

    member: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.keys: tuple[int, ...] = (0,)
        self.register_buffer("member", torch.zeros(()), persistent=False)

    def forward(self, like: Tensor) -> Tensor:
        """float32 in the shape of `like`."""
        return _Draw.apply(like.detach(), self.member, self.keys)


class Dropout(Noise):
    """Dropout of probability `p` while training."""

    def __init__(self, p: float) -> None:
        super().__init__()
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
    def forward(like: Tensor, member: Tensor, keys: tuple[int, ...]) -> Tensor:
        (key,) = keys
        return _uniform(like.shape, key, like.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None, None]:
        return None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], like: Tensor, member: Tensor, keys: tuple[int, ...]
    ) -> tuple[Tensor, int]:
        shape = list(like.shape)
        if in_dims[0] is not None:
            del shape[in_dims[0]]
        drawn = {key: _uniform(torch.Size(shape), key, like.device) for key in keys}
        return torch.stack([drawn[key] for key in keys]), 0


def _uniform(shape: torch.Size, key: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(key)
    return torch.rand(shape, generator=generator, device=device)
