"""Finds EgoSynth's questions that the seeds of a head disagree about, or that none of them can answer."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from egopatch.extract.datasets import Question
from egopatch.extract.datasets.egosynth.scene import OBJECTS
from egopatch.train.scores.metrics import same_lower_cased

# A wording with fewer test questions says little.
LEAST = 30
# A wording is listed if seeds differ by `SPREAD` points, or if their mean is below `LOW`.
SPREAD, LOW = 20, 25


def wording(question: Question) -> str:
    """The question without the names of its objects."""
    text = question.text
    for name in OBJECTS:
        text = text.replace(name, "...")
    return text


def disagreements(
    train: Sequence[Question], test: Sequence[Question], answers: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Wordings whose accuracy differs between seeds by `SPREAD` points or has a mean below `LOW`, and all others.

    Args:
        train: Training questions.
        test: Test questions.
        answers: The answer of each seed by question id.

    Returns:
        Rows of wording, number of training and of test questions, and percent right of each seed.
    """
    known: dict[str, int] = defaultdict(int)
    for question in train:
        known[wording(question)] += 1
    right: dict[str, list[list[bool]]] = defaultdict(list)
    for question in test:
        right[wording(question)].append([same_lower_cased(question, seed[question.question_id]) for seed in answers])
    rows, others = [], []
    for text, of_questions in sorted(right.items(), key=lambda item: -len(item[1])):
        shares = 100 * np.mean(of_questions, axis=0)
        if len(of_questions) >= LEAST and (np.ptp(shares) >= SPREAD or shares.mean() < LOW):
            rows.append(_row(text, known[text], of_questions))
        else:
            others += of_questions
    return [*rows, _row("all others", len(train) - sum(row["train"] for row in rows), others)]


def _row(text: str, train: int, right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    of_seeds = [round(float(share), 1) for share in 100 * np.mean(right, axis=0)]
    return {"wording": text, "train": train, "test": len(right), "of_seeds": of_seeds}
