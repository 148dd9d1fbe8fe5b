"""How close answers are to the annotated ones as texts: exact match, BLEU-4, METEOR and ROUGE-L, as for QAEgo4D.

All but exact match are computed by libraries: BLEU by sacrebleu, METEOR by nltk, ROUGE by rouge-score. `pip install
'egopatch[text-metrics]'` installs them.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from egopatch.extract.datasets import Question
from egopatch.train.scores.metrics import normalise

NAMES = {"exact_match": "Exact match", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L"}
INSTALL = "pip install 'egopatch[text-metrics]'"
WORDNET = "python -m nltk.downloader wordnet"


class TextMetricsError(ValueError):
    """A library or its data are missing; the message names the command that installs them."""


def text_metrics(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, float]:
    """Metrics in percent, by name: `exact_match`, `bleu_4` of the corpus, `meteor` and `rouge_l`, means over questions.

    Without questions there are none.

    Args:
        questions: Questions with annotated answers.
        answers: Answer to every question, by id.

    Raises:
        TextMetricsError: A library is not installed, or WordNet, which METEOR needs.
    """
    if not questions:
        return {}
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
    # nltk's BLEU counts a missing 4-gram for every answer of fewer than four words, also for a right one.
    bleu = BLEU(lowercase=True, smooth_method="none").corpus_score(
        [given for _, given in pairs], [[r for r, _ in pairs]]
    )
    return {
        "exact_match": 100 * fmean(right == given for right, given in pairs),
        "bleu_4": float(bleu.score),
        "meteor": 100 * fmean(meteor_score([right], given, wordnet=wordnet) for right, given in words),
        "rouge_l": 100 * fmean(rouge.score(right, given)["rougeL"].fmeasure for right, given in pairs),
    }
