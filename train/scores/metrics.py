"""EgoTaskQA's metrics: Open, Binary, All, All over the split's own tag, and every reasoning tag, each with its count.

Accuracies are percentages. There are two matching rules:

- lower-cased: an answer is right if it equals the annotated one after lower-casing and stripping. This project reports
  it.
- released: the rule of the published code for val and test. An annotated answer whose exact spelling, capital letters
  included, is not in the answer set becomes `<UNK1>`, so hardly any system gets it right.

Under both rules every question counts towards n.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from egopatch.extract.datasets import Question, parsing
from egopatch.extract.datasets.records import UNKNOWN_ANSWERS
from egopatch.features.common.command_line import pick_varied
from egopatch.features.common.units import counted

# Whether a given answer to the question is right.
MatchingRule = Callable[[Question, str], bool]

# Faults of one file that are listed; the rest are counted.
SHOWN_FAULTS = 20


class PredictionError(ValueError):
    """A predictions file cannot be scored; the message has one line per fault, with file and line number."""


@dataclass(frozen=True)
class Score:
    """Accuracy in percent over `n` questions; None without questions."""

    accuracy: float | None
    n: int


@dataclass(frozen=True)
class Metrics:
    """Accuracies of one system on one set of questions.

    Attributes:
        open: Questions that ask for an answer (structural `query`).
        binary: Questions that ask for a yes or no (structural `verify`).
        all: Every question.
        split_tag: Questions tagged with the name of the split (`direct` or `indirect`); None without a split.
        tags: Score of each reasoning tag, in alphabetical order. A question counts under each of its tags.
        wrong_form: Number of questions with an answer of the other form, such as `cup` to a yes/no question.
        quarantined: Number of questions about quarantined clips, for which the majority answer stands in.
    """

    open: Score
    binary: Score
    all: Score
    split_tag: Score | None
    tags: Mapping[str, Score]
    wrong_form: int
    quarantined: int = 0

    def as_json(self) -> dict[str, Any]:
        """The scores in the layout of `train score --json` and `test.json`, without `wrong_form` and `quarantined`."""
        return {name: value for name, value in asdict(self).items() if name not in ("wrong_form", "quarantined")}

    def rows(self) -> list[tuple[str, Score]]:
        """Every score with its name, in reading order."""
        rows = self.headline_rows()
        if self.split_tag is not None:
            rows.append(("all, split's tag", self.split_tag))
        return rows + [(f"tag {tag}", accuracy) for tag, accuracy in self.tags.items()]

    def headline_rows(self) -> list[tuple[str, Score]]:
        """The scores over open, binary and all questions."""
        return [("open", self.open), ("binary", self.binary), ("all", self.all)]


def headline(metrics: Metrics) -> str:
    """One line: the accuracies over open, binary and all questions, each with its count."""
    return ", ".join(
        f"{name} {score.accuracy:.2f} (n {score.n})"
        for name, score in metrics.headline_rows()
        if score.accuracy is not None
    )


def lines(metrics: Metrics, released: Metrics | None = None) -> list[str]:
    """One line per score, and one on answers of the wrong form; with `released`, also the scores under that rule and
    the difference.
    """
    rows = metrics.rows()
    width = max(len(name) for name, _ in rows)
    wrong_form = wrong_form_line(metrics)
    if released is None:
        return [*(f"{name:<{width}}  {_percent(score.accuracy):>6}  n {score.n}" for name, score in rows), wrong_form]
    return [
        f"{'':<{width}}  lower-cased  released  difference",
        *(
            f"{name:<{width}}  {_percent(ours.accuracy):>11}  {_percent(theirs.accuracy):>8}"
            f"  {_change(ours, theirs):>10}  n {ours.n}"
            for (name, ours), (_, theirs) in zip(rows, released.rows(), strict=True)
        ),
        wrong_form,
    ]


def wrong_form_line(metrics: Metrics) -> str:
    """One line on how many answers have the wrong form."""
    return f"answers of the wrong form: {metrics.wrong_form} of {metrics.all.n}"


def difference(metrics: Metrics, released: Metrics) -> str:
    """One line: the scores under the released matching rule and how far they are from the lower-cased ones."""
    pairs = zip(metrics.headline_rows(), released.headline_rows(), strict=True)
    changes = [f"{name} {_percent(theirs.accuracy)} ({_change(ours, theirs)})" for (name, ours), (_, theirs) in pairs]
    return f"scores under the released matching rule (difference from lower-cased): {', '.join(changes)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _change(ours: Score, theirs: Score) -> str:
    return "–" if ours.accuracy is None or theirs.accuracy is None else f"{theirs.accuracy - ours.accuracy:+.2f}"


def same_lower_cased(question: Question, given: str) -> bool:
    """The lower-cased matching rule."""
    return normalise(given) == normalise(question.answer)


def same_as_released(vocabulary: Collection[str]) -> MatchingRule:
    """The released matching rule for an answer set.

    A question's `answer_encode` decides whether its answer is known; without one, its spelling must be in the set.
    """

    def same(question: Question, given: str) -> bool:
        known = (
            question.spelling in vocabulary if question.encoded is None else question.encoded >= len(UNKNOWN_ANSWERS)
        )
        return given.strip() == (question.answer if known else UNKNOWN_ANSWERS[1])

    return same


def score(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    split: str | None,
    same: MatchingRule = same_lower_cased,
) -> Metrics:
    """Metrics of a system's answers.

    Args:
        questions: Questions with unique ids.
        answers: Answer to every question, by id; extra ids are ignored.
        split: Tag of the questions over which the published "All" is counted; None omits that score.
        same: Matching rule.

    Raises:
        ValueError: A question has no answer.
    """
    questions = [question for question in questions if question.counts]
    if absent := [question.question_id for question in questions if question.question_id not in answers]:
        raise ValueError(
            f"{counted(len(absent), 'question has', 'questions have')} no answer, such as {absent[0]!r}; expected "
            "one answer per question"
        )
    right: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for question in questions:
        hit = same(question, answers[question.question_id])
        for group in ("all", f"form:{question.form}", *(f"tag:{tag}" for tag in dict.fromkeys(question.tags))):
            right[group] += hit
            count[group] += 1

    def accuracy(group: str) -> Score:
        n = count[group]
        return Score(100 * right[group] / n if n else None, n)

    tags = sorted(group.removeprefix("tag:") for group in count if group.startswith("tag:"))
    return Metrics(
        open=accuracy("form:open"),
        binary=accuracy("form:binary"),
        all=accuracy("all"),
        split_tag=None if split is None else accuracy(f"tag:{split}"),
        tags={tag: accuracy(f"tag:{tag}") for tag in tags},
        wrong_form=count_wrong_form(questions, answers),
    )


def count_wrong_form(questions: Sequence[Question], answers: Mapping[str, str]) -> int:
    """Number of questions with an answer of the other form: for a binary question, one that is not yes, no or the
    annotated answer of a binary question; for an open question, one that only binary questions have as theirs.
    """
    annotated: dict[str, set[str]] = {"open": set(), "binary": {"yes", "no"}}
    for question in questions:
        annotated[question.form].add(normalise(question.answer))
    only_binary = annotated["binary"] - annotated["open"]
    return sum(
        (given not in annotated["binary"]) if question.form == "binary" else given in only_binary
        for question in questions
        for given in [normalise(answers[question.question_id])]
    )


def normalise(answer: str) -> str:
    """The form in which answers are compared: stripped and lower-cased."""
    return answer.strip().lower()


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Answers by question id from a file of `{"question_id": ..., "answer": ...}` lines, one for each question.

    Raises:
        PredictionError: The file is missing or not text, a line is malformed, or an id is repeated, unknown or missing.
            If most ids are unknown, one line counts them. Missing ids are left out if malformed lines may be theirs.
    """
    known = {question.question_id for question in questions}
    answers: dict[str, str] = {}
    unknown: list[str] = []
    malformed: list[str] = []
    faults: list[str] = []
    try:
        lines_read = parsing.json_lines(path, 'the answers, one {"question_id", "answer"} per line')
        for position, (question_id, answer) in parsing.collect(lines_read, _prediction, malformed):
            if question_id in answers:
                faults.append(
                    f"{position}: question_id {question_id!r} is answered twice; expected one line per question"
                )
            elif question_id not in known:
                unknown.append(question_id)
                faults.append(
                    f"{position}: question_id {question_id!r} is not in the questions file; expected one of its ids"
                )
            answers[question_id] = answer
    except ValueError as error:
        raise PredictionError(str(error)) from None
    absent = [q.question_id for q in questions if q.question_id not in answers]
    if absent and 2 * len(unknown) > len(answers):
        given, asked = counted(len(answers), "answer"), counted(len(questions), "question")
        raise PredictionError(
            f"{path}: {counted(len(unknown), f'of {given} belongs', f'of {given} belong')} to other questions, such as "
            f"question_id {_some(unknown)}, and {counted(len(absent), f'of {asked} has', f'of {asked} have')} no "
            f"answer, such as {_some(absent)}; use answers and questions of the same data set, split and part"
        )
    faults = malformed + faults
    if len(absent) > len(malformed):
        faults += [f"{path}: question_id {name!r} has no answer; expected one line per question" for name in absent]
    if faults:
        rest = len(faults) - SHOWN_FAULTS
        raise PredictionError(
            "\n".join([*pick_varied(faults, SHOWN_FAULTS), *([f"{path}: and {rest} more"] if rest > 0 else [])])
        )
    return answers


def holds_answers(path: Path) -> bool:
    """Whether the first line of a file is an answer without the question's text."""
    try:
        _, record = next(parsing.json_lines(path, "answers"))
        _prediction(record)
        return not {"question", "part"} & parsing.as_object(record).keys()
    except (StopIteration, ValueError):
        return False


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3]))


def _prediction(record: object) -> tuple[str, str]:
    fields = parsing.as_object(record)
    question_id, answer = parsing.id_field(fields, "question_id"), fields.get("answer")
    if isinstance(answer, str) and not answer.strip():
        return question_id, ""  # a system may have nothing to say
    return question_id, parsing.answer_field(fields, "answer")
