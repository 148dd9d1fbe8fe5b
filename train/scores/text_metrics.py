"""Compares answers with the annotated ones as texts: exact match, BLEU-4, METEOR and ROUGE-L, as for QAEgo4D.

All but exact match are computed by libraries: BLEU by sacrebleu, METEOR by nltk, ROUGE by rouge-score. `pip install
'egopatch[text-metrics]'` installs them.

BLEU is a single number for all answers: a product of powers of sums over them. To first order, a clip shifts it by
what the clip adds to the logarithms of these sums, and its interval is then computed like that of a mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from egopatch.extract.datasets import Question
from egopatch.train.scores.metrics import normalise
from egopatch.train.scores.statistics import Interval, Matrix, accuracy, clip_sums, interval

NAMES = {"exact_match": "Exact match", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L"}
INSTALL = "pip install 'egopatch[text-metrics]'"
WORDNET = "python -m nltk.downloader wordnet"


class TextMetricsError(ValueError):
    """A library or its data are missing; the message names the command that installs them."""


@dataclass(frozen=True)
class _Texts:
    """The answers of one system, Q of them.

    Attributes:
        values: [Q] values from 0 to 1, for each metric that is a mean over answers.
        correct, total: [4, Q] number of n-grams, n = 1 to 4, that are also in the annotated answer, and of all.
        lengths, right_lengths: [Q] number of words of the answer and of the annotated one.
    """

    values: Mapping[str, Matrix]
    correct: Matrix
    total: Matrix
    lengths: Matrix
    right_lengths: Matrix

    def bleu(self) -> float:
        """BLEU-4 of all answers, in percent."""
        from sacrebleu.metrics.bleu import BLEU

        counts = [[int(n) for n in sums] for sums in (self.correct.sum(axis=1), self.total.sum(axis=1))]
        return float(BLEU.compute_bleu(*counts, int(self.lengths.sum()), int(self.right_lengths.sum())).score)

    def bleu_effects(self, clips: Sequence[str]) -> Matrix | None:
        """[C] shift of BLEU by each clip, times C; None if BLEU is 0, since it then has no slope."""
        if not self.correct.sum(axis=1).all():
            return None

        def share(counts: Matrix) -> Matrix:
            return clip_sums(counts, clips) / counts.sum(axis=-1, keepdims=True)

        logarithm = (share(self.correct) - share(self.total)).mean(axis=0)
        length, right = self.lengths.sum(), self.right_lengths.sum()
        if length < right:  # the penalty for brevity, exp(1 - right / length)
            logarithm += right / length * (share(self.lengths) - share(self.right_lengths))
        return np.asarray(self.bleu() * logarithm * len(logarithm))


def text_metrics(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, float]:
    """Metrics in percent, by name: `exact_match`, `bleu_4` of the corpus, `meteor` and `rouge_l`, means over questions.

    Without questions there are none.

    Args:
        questions: Questions with annotated answers.
        answers: Answer to every question, by id.

    Raises:
        TextMetricsError: A library is not installed, or WordNet, which METEOR needs.
    """
    return {name: found.mean for name, found in text_intervals(questions, [answers]).items()}


def text_intervals(questions: Sequence[Question], answers: Sequence[Mapping[str, str]]) -> dict[str, Interval]:
    """The metrics of a system, mean over its seeds, with their intervals over seeds and clips.

    If a seed's BLEU is 0, nothing is known about that of other clips, so its interval is 0 to 100.

    Args:
        questions: As for `text_metrics`.
        answers: Answers of each seed, by question id.

    Raises:
        TextMetricsError: As `text_metrics`.
    """
    if not questions:
        return {}
    clips = [question.clip_id for question in questions]
    seeds = [_compare(questions, seed_answers) for seed_answers in answers]
    found = {name: accuracy([seed.values[name] for seed in seeds], clips) for name in seeds[0].values}
    scores, effects = [seed.bleu() for seed in seeds], [seed.bleu_effects(clips) for seed in seeds]
    known = [seed for seed in effects if seed is not None]
    unknown = Interval(float(np.mean(scores)), 0.0, 100.0)
    found["bleu_4"] = interval(scores, known) if len(known) == len(seeds) else unknown
    return {name: found[name] for name in NAMES}


def _compare(questions: Sequence[Question], answers: Mapping[str, str]) -> _Texts:
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise TextMetricsError(f"{error.name} is not installed; run: {INSTALL}") from None
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise TextMetricsError(f"METEOR needs WordNet, which nltk does not find; run: {WORDNET}") from None
    pairs = [(normalise(question.answer), normalise(answers[question.question_id])) for question in questions]
    words = [(right.split(), given.split()) for right, given in pairs]
    rouge = RougeScorer(["rougeL"])
    # Only the counts of each answer are used: nltk's BLEU counts a missing 4-gram for every answer of fewer than four
    # words, also for a right one. `effective_order` keeps sacrebleu from warning about that.
    bleu = BLEU(lowercase=True, smooth_method="none", effective_order=True)
    counted = [bleu.sentence_score(given, [right]) for right, given in pairs]
    values = {
        "exact_match": [right == given for right, given in pairs],
        "meteor": [meteor_score([right], given, wordnet=wordnet) for right, given in words],
        "rouge_l": [rouge.score(right, given)["rougeL"].fmeasure for right, given in pairs],
    }
    return _Texts(
        {name: np.array(of_all, dtype=float) for name, of_all in values.items()},
        np.array([answer.counts for answer in counted], dtype=float).T,
        np.array([answer.totals for answer in counted], dtype=float).T,
        np.array([answer.sys_len for answer in counted], dtype=float),
        np.array([answer.ref_len for answer in counted], dtype=float),
    )
