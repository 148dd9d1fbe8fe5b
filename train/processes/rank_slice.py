"""The rows of a batch that one rank works on: the questions about its own clips."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankSlice:
    """The rows of the whole batch, in rising order, that hold a rank's questions, clips and texts.

    Attributes:
        questions, clips, texts: [n] long.
        total: Number of questions in the whole batch.
    """

    questions: Tensor
    clips: Tensor
    texts: Tensor
    total: int

    @classmethod
    def of(cls, clips: Tensor, texts: Tensor, mask: Tensor) -> "RankSlice":
        """The slice of the questions where `mask` [B] bool is true, in a batch with these `clips` and `texts` [B]."""
        rows = mask.nonzero()[:, 0]
        return cls(rows, _unique_rows(clips, clips[rows]), _unique_rows(texts, texts[rows]), len(mask))

    def with_texts(self, texts: Tensor) -> "RankSlice":
        """The same slice of a batch whose questions have these `texts` [B]."""
        return replace(self, texts=_unique_rows(texts, texts[self.questions]))

    def sent(self, send: Callable[[Tensor], Tensor]) -> "RankSlice":
        """The same slice with each tensor of rows replaced by what `send` returns for it."""
        return RankSlice(send(self.questions), send(self.clips), send(self.texts), self.total)


def _unique_rows(whole: Tensor, selected: Tensor) -> Tensor:
    """Positions of the unique values of `selected` among the unique values of `whole`."""
    return torch.searchsorted(whole.unique(), selected.unique())
