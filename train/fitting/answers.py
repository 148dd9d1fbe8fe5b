"""What heads answer to a table of questions, and what these answers score."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from egopatch.train.data.batch import Batch
from egopatch.train.data.features import Features
from egopatch.train.data.question_table import FORMS, NO_CLASS, QuestionTable, plan_batches
from egopatch.train.fitting.experiment import Experiment
from egopatch.train.fitting.stacked_heads import Stack
from egopatch.train.scores.metrics import Metrics, normalise, same_lower_cased, score


@dataclass(frozen=True)
class Answers:
    """What a head says.

    Attributes:
        classes: [Q] predicted class of each question of a table.
        kept: [Q, T, k] int16, the patches that psa kept; None for other heads, or where not asked for.
    """

    classes: Tensor
    kept: np.ndarray | None


def answer_table(
    stacks: Sequence[Stack],
    features: Features,
    table: QuestionTable,
    size: int,
    keep_patches: bool = True,
) -> list[list[Answers]]:
    """What each member of each stack answers to every question of `table`, whose clips are encoded, on one reading.

    Without `keep_patches`, `Answers.kept` is None.
    """
    classes = [torch.zeros(len(stack), len(table), dtype=torch.long) for stack in stacks]
    kept: list[list[np.ndarray | None]] = [[None] * len(stack) for stack in stacks]
    plan = plan_batches(table, size, seed=None)
    found = [
        (batch.rows, [_answer(stack, batch, number, keep_patches) for stack in stacks])
        for number, batch in enumerate(features.stream(table, plan))
        if len(batch)
    ]
    for rows, answers in itertools.chain(*features.ranks.gather(found)):
        for said, chosen, (predicted, indices) in zip(classes, kept, answers, strict=True):
            said[:, rows] = predicted
            for member, part in enumerate(indices):
                whole = chosen[member]
                if whole is None:
                    whole = chosen[member] = np.zeros((len(table), *part.shape[1:]), dtype=np.int16)
                whole[rows.numpy()] = part
    return [
        [Answers(*pair) for pair in zip(said, chosen, strict=True)] for said, chosen in zip(classes, kept, strict=True)
    ]


def _answer(stack: Stack, batch: Batch, number: int, keep_patches: bool) -> tuple[Tensor, list[np.ndarray]]:
    """Classes [M, B], and of each member the indices [B, T, k] of what it kept; none where none are wanted or kept."""
    classes, masks = stack.answer(batch, number)
    if masks is None or not keep_patches:
        return classes, []
    # Every frame keeps as many, so that the indices of all of them make an array.
    return classes, [mask.nonzero()[:, -1].view(*mask.shape[:2], -1).to(torch.int16).numpy() for mask in masks]


class Marks:
    """Accuracies of many answers to one part: what `score_part` gives of open, binary and all, in far less time.

    Args:
        experiment: its data.
        part: of the questions.
    """

    def __init__(self, experiment: Experiment, part: str) -> None:
        vocabulary, table, seen = experiment.dataset.answers, experiment.tables[part], experiment.encoded(part)
        first: dict[str, int] = {}
        # Classes that compare alike share a number.
        self._alike = torch.tensor([first.setdefault(normalise(a), index) for index, a in enumerate(vocabulary)])
        truth = [first.get(normalise(question.answer), NO_CLASS) for question in seen.questions]
        self._truth = torch.tensor(truth, dtype=torch.long)
        self._form = seen.form
        known = {question.question_id for question in seen.questions}
        fallback = _majority(experiment.train_table, vocabulary)
        blind = [q for q in table.questions if q.question_id not in known]
        self._blind = [sum(same_lower_cased(q, fallback[q.form]) for q in blind if q.form == form) for form in FORMS]
        self._count = [int((table.form == index).sum()) for index in range(len(FORMS))]

    def accuracies(self, said: Answers) -> dict[str, float | None]:
        """`open`, `binary` and `all`, percent; None where there are no such questions."""
        hits = self._alike[said.classes] == self._truth
        right = [int(hits[self._form == index].sum()) + self._blind[index] for index in range(len(FORMS))]
        shares = [100 * hit / count if count else None for hit, count in zip(right, self._count, strict=True)]
        return {**dict(zip(FORMS, shares, strict=True)), "all": 100 * sum(right) / sum(self._count)}


def score_part(experiment: Experiment, part: str, said: Answers) -> tuple[Metrics, dict[str, str]]:
    """Metrics over every question of `part`, and the answers as text; where the clip is quarantined, the majority's."""
    vocabulary, table = experiment.dataset.answers, experiment.tables[part]
    seen = {
        question.question_id: vocabulary[answer]
        for question, answer in zip(experiment.encoded(part).questions, said.classes.tolist(), strict=True)
    }
    fallback = _majority(experiment.train_table, vocabulary)
    texts = {q.question_id: seen.get(q.question_id, fallback[q.form]) for q in table.questions}
    return score(table.questions, texts, experiment.dataset.split), texts


def _majority(table: QuestionTable, vocabulary: Sequence[str]) -> dict[str, str]:
    most = {}
    for index, form in enumerate(FORMS):
        answers = table.answer[table.form == index]
        most[form] = vocabulary[int(torch.bincount(answers if len(answers) else table.answer).argmax())]
    return most
