"""The questions of one part as arrays, and the plan of batches for one pass over them.

Shape legend: Q questions.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from egopatch.extract.datasets import Dataset, Question

FORMS = ("open", "binary")
# Class of an answer outside the training vocabulary: never trained on, always counted wrong.
NO_CLASS = -1
# Takes the place of an option where a question has fewer than others.
NO_OPTION = -1


@dataclass(frozen=True)
class QuestionTable:
    """The questions of one part as arrays.

    Attributes:
        questions: The questions, in order.
        clips: Unique clips, in the order of first appearance.
        clip: [Q] index into `clips`.
        text: [Q] index into the texts that the table was created with.
        form: [Q] index into `FORMS`.
        answer: [Q] class or `NO_CLASS`; the class of a multiple-choice question is the index of the right option.
        options: [Q, K] index of each option into those texts, -1 where a question has fewer; None without options.
        lengths: [Q, K] number of characters of each option, -1 likewise; None without options.
        variants: [Q, 2] index of each question's paraphrase and counterfactual into those texts; None if not requested.
    """

    questions: tuple[Question, ...]
    clips: tuple[str, ...]
    clip: Tensor
    text: Tensor
    form: Tensor
    answer: Tensor
    options: Tensor | None = None
    lengths: Tensor | None = None
    variants: Tensor | None = None

    @classmethod
    def from_questions(
        cls, questions: Sequence[Question], dataset: Dataset, text_rows: Mapping[str, int], variants: bool = False
    ) -> "QuestionTable":
        """Table of `questions`, all with variants if `variants` is set; `text_rows` maps each text to its row."""
        classes = {answer: index for index, answer in enumerate(dataset.answers)}
        choices = dataset.choices

        def class_of(question: Question) -> int:
            if question.options:
                return NO_CLASS if question.answer_index is None else question.answer_index
            return classes.get(question.answer, NO_CLASS)

        def of_options(number: Callable[[str], int]) -> Tensor | None:
            rows = [[*map(number, q.options), *[NO_OPTION] * (choices - len(q.options))] for q in questions]
            return torch.tensor(rows, dtype=torch.long).view(-1, choices) if choices else None

        def of_variants() -> Tensor:
            rows = [[text_rows[text] for text in question.variants or ()] for question in questions]
            return torch.tensor(rows, dtype=torch.long).view(-1, 2)

        clips = {name: index for index, name in enumerate(dict.fromkeys(q.clip_id for q in questions))}
        return cls(
            questions=tuple(questions),
            clips=tuple(clips),
            clip=torch.tensor([clips[q.clip_id] for q in questions], dtype=torch.long),
            text=torch.tensor([text_rows[q.text] for q in questions], dtype=torch.long),
            form=torch.tensor([FORMS.index(q.form) for q in questions], dtype=torch.long),
            answer=torch.tensor([class_of(q) for q in questions], dtype=torch.long),
            options=of_options(text_rows.__getitem__),
            lengths=of_options(len),
            variants=of_variants() if variants else None,
        )

    def __len__(self) -> int:
        return len(self.questions)

    def without_clips(self, clips: Collection[str]) -> "QuestionTable":
        """The questions whose clip is not one of `clips`."""
        dropped = torch.tensor([name in clips for name in self.clips], dtype=torch.bool)
        return self._subset(~dropped[self.clip])

    def answerable(self) -> "QuestionTable":
        """The questions whose answer is in the vocabulary: those that a head can learn from."""
        return self._subset(self.answer != NO_CLASS)

    def without_classes(self) -> list[Question]:
        """The questions whose answer is outside the vocabulary: no head can answer them."""
        return [self.questions[row] for row in (self.answer == NO_CLASS).nonzero()[:, 0].tolist()]

    def _subset(self, keep: Tensor) -> "QuestionTable":
        if bool(keep.all()):
            return self
        kept = keep.nonzero()[:, 0]
        clips, clip = self.clip[kept].unique(return_inverse=True)
        return QuestionTable(
            questions=tuple(self.questions[row] for row in kept.tolist()),
            clips=tuple(self.clips[row] for row in clips.tolist()),
            clip=clip,
            text=self.text[kept],
            form=self.form[kept],
            answer=self.answer[kept],
            options=None if self.options is None else self.options[kept],
            lengths=None if self.lengths is None else self.lengths[kept],
            variants=None if self.variants is None else self.variants[kept],
        )


def plan_batches(table: QuestionTable, size: int, seed: int | None, epoch: int = 0) -> list[np.ndarray]:
    """Rows of each batch of one pass. A batch holds whole clips, and is closed before it exceeds `size` questions.

    The order follows from `seed` and `epoch` alone, so a resumed run finds its position by counting batches. Without a
    seed the clips keep their order. A clip with more than `size` questions is a batch of its own.
    """
    by_clip = np.argsort(table.clip.numpy(), kind="stable")
    groups = np.split(by_clip, np.cumsum(np.bincount(table.clip.numpy(), minlength=len(table.clips)))[:-1])
    order = np.arange(len(groups)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(groups))
    batches: list[np.ndarray] = []
    current: list[np.ndarray] = []
    count = 0
    for clip in order:
        if current and count + len(groups[clip]) > size:
            batches.append(np.concatenate(current))
            current, count = [], 0
        current.append(groups[clip])
        count += len(groups[clip])
    return [*batches, np.concatenate(current)] if current else batches
