"""Random numbers of heads as a function of keys alone: there is no state to save, and equal keys give equal numbers.

The trainer sets the keys before each step, from the seed, the step and the place in the head. Members of a stack with
one seed draw alike, so that what else they differ in is compared on the same noise. A rank that works on a part of the
batch draws for the whole and takes its rows, so that the numbers do not depend on how many ranks there are.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from egopatch.train.processes.rank_slice import RowSubset

Axis = Literal["questions", "clips", "texts"]


class Noise(nn.Module):
    """Uniform numbers in [0, 1).

    Args:
        over: what the first dimension counts.

    Attributes:
        keys: one for each draw that members of a stack take: as many as they have seeds.
        part: which rows of the whole batch are here; None is all of them.
        member: scalar long, the place in `keys` of this member's. Within a stack `vmap` gives each member its own.
    """

    member: Tensor

    def __init__(self, over: Axis = "questions") -> None:
        super().__init__()
        self.over = over
        self.part: RowSubset | None = None
        self.keys: tuple[int, ...] = (0,)
        self.register_buffer("member", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, like: Tensor) -> Tensor:
        """float32 in the shape of `like`."""
        return self._own(self._draw(like))

    def _draw(self, like: Tensor) -> Tensor:
        """[keys, *like.shape]: what every seed draws, whichever member asks."""
        rows = like.shape[0] if self.part is None else self.part.total
        drawn = []
        for key in self.keys:
            generator = torch.Generator(like.device).manual_seed(key)
            drawn.append(torch.rand((rows, *like.shape[1:]), generator=generator, device=like.device))
        together = torch.stack(drawn)
        return together if self.part is None else together[:, self.part.rows.to(like.device)]

    def _own(self, drawn: Tensor) -> Tensor:
        """This member's of the draws."""
        return drawn[0] if len(self.keys) == 1 else drawn[self.member]


class Dropout(Noise):
    """Dropout of probability `p` while training."""

    def __init__(self, p: float, over: Axis = "questions") -> None:
        super().__init__(over)
        self.p = p

    def forward(self, like: Tensor) -> Tensor:
        """`like` with a share of its entries zero and the others scaled up."""
        if not self.training or self.p == 0:
            return like
        return like * self._own(((self._draw(like) >= self.p) / (1 - self.p)).to(like.dtype))


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
