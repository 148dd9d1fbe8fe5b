"""Answers of heads to the questions of one part, and their scores."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from egopatch.train.data.batch import Batch
from egopatch.train.data.question_table import FORMS, NO_CLASS, plan_batches
from egopatch.train.fitting.experiment import Experiment
from egopatch.train.scores.metrics import Metrics, normalise, same_lower_cased, score
from egopatch.train.steps.stacked_heads import StackedHeads


@dataclass(frozen=True)
class Answers:
    """Answers of one head to the Q questions of a part whose clips are encoded.

    Attributes:
        classes: [Q] predicted class of each question.
        kept: [Q, T, k] int16, indices of the patches that psa kept; None for other heads, or without `keep_patches`.
    """

    classes: Tensor
    kept: np.ndarray | None


def answer_part(
    experiment: Experiment, part: str, stacks: Sequence[StackedHeads], keep_patches: bool = True
) -> list[list[Answers]]:
    """Let every head of every stack answer the questions of `part` whose clips are encoded; clips are read only once.

    The stacks have one batch size.
    """
    features, table = experiment.features, experiment.encoded[part]
    classes = [torch.zeros(len(heads), len(table), dtype=torch.long) for heads in stacks]
    kept: list[list[np.ndarray | None]] = [[None] * len(heads) for heads in stacks]
    plan = plan_batches(table, stacks[0].train.batch, seed=None)
    rank_answers = [
        (batch.rows, [_answer(heads, batch, number, keep_patches) for heads in stacks])
        for number, batch in enumerate(features.stream(table, plan))
        if len(batch)
    ]
    for rows, answers in itertools.chain(*features.ranks.gather(rank_answers)):
        for stack_classes, stack_kept, (predicted, indices) in zip(classes, kept, answers, strict=True):
            stack_classes[:, rows] = predicted
            for number, batch_kept in enumerate(indices):
                table_kept = stack_kept[number]
                if table_kept is None:
                    shape = (len(table), *batch_kept.shape[1:])
                    table_kept = stack_kept[number] = np.zeros(shape, dtype=np.int16)
                table_kept[rows.numpy()] = batch_kept
    return [
        [Answers(*head) for head in zip(stack_classes, stack_kept, strict=True)]
        for stack_classes, stack_kept in zip(classes, kept, strict=True)
    ]


def _answer(heads: StackedHeads, batch: Batch, number: int, keep_patches: bool) -> tuple[Tensor, list[np.ndarray]]:
    """Classes [M, B], and for each head the indices [B, T, k] of the kept patches; none if not requested or kept."""
    classes, masks = heads.answer(batch, number, keep_patches)
    if masks is None:
        return classes, []
    # Every frame keeps the same number of patches, so the indices of all frames form an array.
    return classes, [mask.nonzero()[:, -1].view(*mask.shape[:2], -1).to(torch.int16).numpy() for mask in masks]


class PartScorer:
    """Computes `open`, `binary` and `all` for many answers to one part, as `score_part` does but much faster.

    As there, questions without a published answer do not count, and an option with the text of the right one is
    right at every index.
    """

    def __init__(self, experiment: Experiment, part: str) -> None:
        vocabulary, table, encoded = experiment.dataset.answers, experiment.tables[part], experiment.encoded[part]
        # [Q, K] or, where all questions share their classes, [1, A]: classes that compare as equal share a number.
        if encoded.options is not None:
            self._canonical = torch.full(encoded.options.shape, NO_CLASS)
            for row, question in enumerate(encoded.questions):
                written = [normalise(option) for option in question.options]
                self._canonical[row, : len(written)] = torch.tensor([written.index(option) for option in written])
            self._truth = encoded.answer
        else:
            first: dict[str, int] = {}
            numbers = [first.setdefault(normalise(answer), index) for index, answer in enumerate(vocabulary)]
            self._canonical = torch.tensor([numbers])
            truth = [first.get(normalise(question.answer), NO_CLASS) for question in encoded.questions]
            self._truth = torch.tensor(truth, dtype=torch.long)
        # [F, Q] which questions of each form count.
        counts = torch.tensor([question.counts for question in encoded.questions], dtype=torch.bool)
        self._counted = [(encoded.form == index) & counts for index in range(len(FORMS))]
        encoded_ids = {question.question_id for question in encoded.questions}
        others = [q for q in table.questions if q.counts and q.question_id not in encoded_ids]
        self._fallback_hits = [
            sum(same_lower_cased(q, experiment.fallback_answer(q)) for q in others if q.form == form) for form in FORMS
        ]
        self._totals = [sum(q.counts and q.form == form for q in table.questions) for form in FORMS]

    def accuracies(self, answers: Answers) -> dict[str, float | None]:
        """`open`, `binary` and `all` in percent; None where no such question counts."""
        classes = answers.classes[:, None]
        canonical = self._canonical.expand(len(classes), -1).gather(1, classes)[:, 0]
        right = canonical == self._truth
        accuracies: dict[str, float | None] = {}
        all_hits = 0
        for index, form in enumerate(FORMS):
            hits = int(right[self._counted[index]].sum()) + self._fallback_hits[index]
            accuracies[form] = _percent(hits, self._totals[index])
            all_hits += hits
        accuracies["all"] = _percent(all_hits, sum(self._totals))
        return accuracies


def _percent(hits: int, total: int) -> float | None:
    return 100 * hits / total if total else None


def score_part(experiment: Experiment, part: str, answers: Answers) -> tuple[Metrics, dict[str, str]]:
    """Metrics over the questions of `part` that count, and the answers to all of them as text; quarantined clips get
    the majority answer.
    """
    table = experiment.tables[part]
    predicted = {
        question.question_id: experiment.answer_of(question, answer)
        for question, answer in zip(experiment.encoded[part].questions, answers.classes.tolist(), strict=True)
    }
    texts = {q.question_id: predicted.get(q.question_id) or experiment.fallback_answer(q) for q in table.questions}
    metrics = score(table.questions, texts, experiment.dataset.split)
    return replace(metrics, quarantined=len(table) - len(predicted)), texts
