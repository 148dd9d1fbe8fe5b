"""What of a batch one rank works on: the questions of the clips that it owns."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some rows of something whole.

    Attributes:
        rows: [n] long, on the CPU, rising: which ones.
        of: how many the whole has.
    """

    rows: Tensor
    of: int


@dataclass(frozen=True)
class Share:
    """Where the rows of a rank's batch lie in the whole one, by what the rows are."""

    questions: Part
    clips: Part
    texts: Part

    @classmethod
    def of(cls, clips: Tensor, texts: Tensor, own: Tensor) -> "Share":
        """The share of the questions that are `own` [B] bool, of a whole batch with these `clips` and `texts` [B]."""
        rows = own.nonzero()[:, 0]
        return cls(Part(rows, len(own)), _of_unique(clips, clips[rows]), _of_unique(texts, texts[rows]))


def _of_unique(whole: Tensor, part: Tensor) -> Part:
    values = whole.unique()
    return Part(torch.searchsorted(values, part.unique()), len(values))
