"""The rows of a batch that one rank works on: the questions about its own clips."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSubset:
    """Some rows of a whole.

    Attributes:
        rows: [n] long, rising: the rows in the subset.
        total: Number of rows of the whole.
    """

    rows: Tensor
    total: int


@dataclass(frozen=True)
class RankSlice:
    """The questions, clips and texts of a rank's batch as rows of the whole batch."""

    questions: RowSubset
    clips: RowSubset
    texts: RowSubset

    @classmethod
    def of(cls, clips: Tensor, texts: Tensor, mask: Tensor) -> "RankSlice":
        """The slice of the questions where `mask` [B] bool is true, in a batch with these `clips` and `texts` [B]."""
        rows = mask.nonzero()[:, 0]
        return cls(RowSubset(rows, len(mask)), _unique_subset(clips, clips[rows]), _unique_subset(texts, texts[rows]))

    def with_texts(self, texts: Tensor) -> "RankSlice":
        """The same slice of a batch whose questions have these `texts` [B]."""
        return replace(self, texts=_unique_subset(texts, texts[self.questions.rows]))

    def sent(self, send: Callable[[Tensor], Tensor]) -> "RankSlice":
        """The same slice with the rows that `send` returns for each tensor of rows."""
        subsets = (self.questions, self.clips, self.texts)
        return RankSlice(*(replace(subset, rows=send(subset.rows)) for subset in subsets))


def _unique_subset(whole: Tensor, selected: Tensor) -> RowSubset:
    values = whole.unique()
    return RowSubset(torch.searchsorted(values, selected.unique()), len(values))
