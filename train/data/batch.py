"""A batch: whole clips and their questions, as heads read them.

Shape legend: C clips of a batch, B questions, L text tokens, D channels, U unique texts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from egopatch.configs.schema import ConfigError
from egopatch.features import PatchTokens


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


@dataclass(frozen=True)
class Options:
    """The options of B multiple-choice questions, at most K each.

    Attributes:
        states: [V, L, D] text states of the unique options.
        mask: [V, L] bool, true on tokens.
        index: [B, K] long, row of `states` of each option; -1 where a question has fewer options.
        lengths: [B, K] long, number of characters of each option; -1 likewise.
    """

    states: Tensor
    mask: Tensor
    index: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Batch:
    """B questions about C clips. Its memory may be reused as soon as the next batch is requested.

    Attributes:
        stored: Tokens of the C clips, or of all resident clips where `clip_rows` selects the C; None for heads that
            read no video.
        clip_rows: [C] long, each clip's row of `stored`; None if `stored` holds just the C clips, in order.
        clip_index: [B] long, the clip that each question is about.
        states: [U, L, D] text states; a text that many questions share is read once.
        mask: [U, L] bool, true on tokens.
        text_index: [B] long, row of `states` of each question.
        forms: [B] long, index into `FORMS`.
        answers: [B] long, class or `NO_CLASS`.
        options: The options of multiple-choice questions, whose classes are their indices; None for other questions.
        rows: Positions of the questions in their table, [B] unless the batch is padded.
        rank_slice: Position of these rows in the whole batch, if other ranks have the rest; None for a whole batch.
        variants: Two batches: one with each question's paraphrase, one with its counterfactual, whose answer is
            unknown; None if they were not requested.
        derived: [clips, ...], for each row of `stored`, what the head derives from it, as `CoarseLevel.derive` does,
            computed once; None if the head derives it in every batch.
        padded: Whether clips, texts and questions are repeated at the end, to give all batches one shape. The repeated
            questions have no position in `rows` and no class.
    """

    stored: PatchTokens | None
    clip_rows: Tensor | None
    clip_index: Tensor
    states: Tensor
    mask: Tensor
    text_index: Tensor
    forms: Tensor
    answers: Tensor
    rows: Tensor
    rank_slice: RankSlice | None = None
    options: Options | None = None
    variants: "tuple[Batch, Batch] | None" = None
    derived: Tensor | None = None
    padded: bool = False

    def __len__(self) -> int:
        """Number of questions, without those that pad the batch."""
        return len(self.rows)

    @cached_property
    def tokens(self) -> PatchTokens:
        """Tokens of the C clips, copied once where more clips are resident; psa reads `stored` in place instead."""
        return PatchTokens(**{name: self.select_clips(tensor) for name, tensor in self._stored().tensors().items()})

    def _stored(self) -> PatchTokens:
        if self.stored is None:
            raise ConfigError(
                "a head reads the tokens of a batch, but its Head has reads_video=False, so no video was read; set "
                "reads_video=True"
            )
        return self.stored

    def select_clips(self, tensor: Tensor) -> Tensor:
        """The rows [C, ...] of one of the stored tensors."""
        return tensor if self.clip_rows is None else tensor[self.clip_rows]

    def patch_chunks(self, clips: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Patches [c, T, n, D] of the C clips, and their scale [c, T, n] if any, c = `clips` clips at a time."""
        stored = self._stored()
        count = len(stored.cls) if self.clip_rows is None else len(self.clip_rows)
        for start in range(0, count, clips):
            chunk = slice(start, start + clips)
            rows = chunk if self.clip_rows is None else self.clip_rows[chunk]
            yield stored.patches[rows], None if stored.scale is None else stored.scale[rows]

    def with_tokens(self, tokens: PatchTokens) -> "Batch":
        """The same questions with `tokens` of the C clips."""
        return replace(self, stored=tokens, clip_rows=None, derived=None)

    @property
    def total_questions(self) -> int:
        """Number of questions in the whole batch, over all ranks."""
        return len(self) if self.rank_slice is None else self.rank_slice.total


def _unique_rows(whole: Tensor, selected: Tensor) -> Tensor:
    """Positions of the unique values of `selected` among the unique values of `whole`."""
    return torch.searchsorted(whole.unique(), selected.unique())
