"""Random numbers of heads as a function of seed, place and step: there is no state to save.

Before each step the trainer sets what to draw. Stacked heads with the same seed draw the same numbers, so that they are
compared on the same noise. A rank with some rows of a batch draws the numbers of those rows, so that the numbers do not
depend on the number of ranks; nor do they depend on the device (`ops/philox`).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from egopatch.train.ops.philox import Draw, dropout, uniform
from egopatch.train.ops.stacked import for_all_heads

Axis = Literal["questions", "clips", "texts"]


class Noise(nn.Module):
    """Uniform numbers in [0, 1).

    Args:
        over: Meaning of the first dimension.

    Attributes:
        draw: The numbers to draw next.
        head_number: Scalar long, which `vmap` replaces by the number of each stacked head.
    """

    head_number: Tensor

    def __init__(self, over: Axis = "questions") -> None:
        super().__init__()
        self.over = over
        self.draw = Draw()
        self.register_buffer("head_number", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, like: Tensor) -> Tensor:
        """float32 in the shape of `like`."""
        if len(self.draw.seeds) > 1:
            drawn: Tensor = for_all_heads(lambda like, _: self.draw_for(like), like, self.head_number)
            return drawn
        return self.draw_for(like)

    def draw_for(self, like: Tensor) -> Tensor:
        """The result of `forward`: for one head, or [M, ...] for `like` [M, ...] of M stacked heads."""
        shape = like.shape[1:] if len(self.draw.seeds) > 1 else like.shape
        return uniform(tuple(shape), self.draw, like.device)


class Dropout(Noise):
    """Dropout of probability `p` while training."""

    def __init__(self, p: float, over: Axis = "questions") -> None:
        super().__init__(over)
        self.p = p

    def forward(self, like: Tensor) -> Tensor:
        """`like` with a fraction `p` of its entries set to zero and the others scaled up."""
        return super().forward(like) if self.training and self.p else like

    def draw_for(self, like: Tensor) -> Tensor:
        """The result of `forward`, as in `Noise`."""
        return dropout(like, self.draw, self.p)


def mix(*numbers: int) -> int:
    """Hash several numbers into one seed of torch."""
    key = 0
    for number in numbers:
        # Steps of SplitMix64, in which every output bit depends on every input bit.
        key = (key + number + 0x9E3779B97F4A7C15) % 2**64
        key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        key = ((key ^ key >> 27) * 0x94D049BB133111EB) % 2**64
        key ^= key >> 31
    return key >> 1
