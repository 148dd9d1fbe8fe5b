"""Random numbers of heads as a function of keys alone: there is no state to save, and equal keys give equal numbers.

The trainer sets the keys before each step, from the seed, the step and the module's place in the head. Stacked heads
with the same seed draw the same numbers, so that they are compared on the same noise. A rank with some rows of a batch
draws numbers for all rows and keeps its own, so that the numbers do not depend on the number of ranks.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from egopatch.train.processes.rank_slice import RowSubset

Axis = Literal["questions", "clips", "texts"]


class Noise(nn.Module):
    """Uniform numbers in [0, 1).

    Args:
        over: Meaning of the first dimension.

    Attributes:
        keys: One key for each different seed of the stacked heads.
        part: Rows of the whole batch that this rank has; None if it has all of them.
        member: Scalar long, index into `keys`. `vmap` gives each stacked head its own.
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
        return self._pick(self._draw(like))

    def _draw(self, like: Tensor) -> Tensor:
        """[keys, *like.shape]: the numbers of every key."""
        rows = like.shape[0] if self.part is None else self.part.total
        drawn = torch.empty(len(self.keys), rows, *like.shape[1:], device=like.device)
        for key, numbers in zip(self.keys, drawn, strict=True):
            numbers.uniform_(generator=torch.Generator(like.device).manual_seed(key))
        return drawn if self.part is None else drawn[:, self.part.rows.to(like.device)]

    def _pick(self, drawn: Tensor) -> Tensor:
        """The numbers of this head's key."""
        return drawn[0] if len(self.keys) == 1 else drawn[self.member]


class Dropout(Noise):
    """Dropout of probability `p` while training."""

    def __init__(self, p: float, over: Axis = "questions") -> None:
        super().__init__(over)
        self.p = p

    def forward(self, like: Tensor) -> Tensor:
        """`like` with a fraction `p` of its entries set to zero and the others scaled up."""
        if not self.training or self.p == 0:
            return like
        return like * self._pick(((self._draw(like) >= self.p) / (1 - self.p)).to(like.dtype))


def mix(*numbers: int) -> int:
    """Hash several numbers into one key."""
    key = 0
    for number in numbers:
        # Steps of SplitMix64, in which every output bit depends on every input bit.
        key = (key + number + 0x9E3779B97F4A7C15) % 2**64
        key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        key = ((key ^ key >> 27) * 0x94D049BB133111EB) % 2**64
        key ^= key >> 31
    return key >> 1
