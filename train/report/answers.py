"""Right and wrong answers of the table's rows, and the intervals computed from them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip, DatasetError, Question, load_dataset
from egopatch.train.report.sources import SourceError
from egopatch.train.rundir.names import PREDICTIONS, TEST
from egopatch.train.rundir.results import COLUMNS, SPLITS, Row, data_title
from egopatch.train.scores.metrics import PredictionError, read_predictions, same_lower_cased
from egopatch.train.scores.statistics import Interval, accuracy
from egopatch.train.scores.text_metrics import TextMetricsError, text_intervals


@dataclass(frozen=True)
class Questions:
    """Test questions and clips of one split.

    Attributes:
        by_id: Questions that count, by id.
        clips: Clips, by id.
        free_answers: As in `extract.datasets.Dataset`.
        unpublished: Questions whose right option a benchmark keeps for its server; systems answer them too.
    """

    by_id: Mapping[str, Question]
    clips: Mapping[str, Clip]
    free_answers: bool = False
    unpublished: tuple[Question, ...] = ()

    @property
    def choices(self) -> bool:
        """Whether the questions have options."""
        return any(question.options for question in self.by_id.values())

    @property
    def clip_ids(self) -> list[str]:
        """Clip of each question, in order."""
        return [question.clip_id for question in self.by_id.values()]


@dataclass(frozen=True)
class Correctness:
    """Right and wrong answers of one row of the table.

    Attributes:
        by_seed: [S, Q] bool, whether each seed answers each question right; questions in the order of `Questions`.
        right: Whether the answer of the seed best on val is right, by question id.
        answers: Answers of the seed best on val, by question id.
    """

    by_seed: np.ndarray
    right: Mapping[str, bool]
    answers: Mapping[str, str]


@dataclass(frozen=True)
class SplitAnswers:
    """The answers of one split's rows, and what table and page compute from them.

    Attributes:
        rows: Rows of the table.
        questions: Questions and clips of the split; none if the annotations cannot be read.
        correctness: By label of every row whose predictions can be read.
        intervals: Interval of each accuracy of these rows, by label and column, or `tag X`.
        texts: Text metrics of the answers, by label and name; empty unless answers are free text.
    """

    rows: Sequence[Row]
    questions: Questions
    correctness: Mapping[str, Correctness]
    intervals: Mapping[tuple[str, str], Interval]
    texts: Mapping[str, Mapping[str, Interval]]


def load_questions(config: Config, split: str) -> Questions:
    """Load the test questions of `split`.

    Raises:
        SourceError: The annotations cannot be read.
    """
    try:
        known = next((name for name in SPLITS if name == split), config.data.split)
        dataset = load_dataset(dataclasses.replace(config.data, split=known))
    except (DatasetError, OSError) as error:
        raise SourceError(_first_line(error)) from error
    asked = dataset.questions["test"]
    return Questions(
        {question.question_id: question for question in asked if question.counts},
        {clip.clip_id: clip for clip in dataset.clips},
        dataset.free_answers,
        tuple(question for question in asked if not question.counts),
    )


def read_split(config: Config, split: str, rows: Sequence[Row], problems: list[str]) -> SplitAnswers:
    """Read the answers of the rows of `split`; each problem adds one line to `problems`."""
    try:
        questions = load_questions(config, split)
    except SourceError as error:
        title = data_title(split, [row.best.card for row in rows])
        problems.append(f"{title}: no intervals and no examples: {error}")
        return SplitAnswers(rows, Questions({}, {}), {}, {}, {})
    by_label, found = {}, dict[tuple[str, str], Interval]()
    for row in rows:
        try:
            by_label[row.label] = correct = correctness(row, questions)
        except SourceError as error:
            problems.append(str(error))
            continue
        problems += accuracy_mismatches(row, correct, questions)
        found |= {(row.label, part): interval for part, interval in intervals(row, correct, questions).items()}
    texts = text_scores([row for row in rows if row.label in by_label], questions, problems)
    return SplitAnswers(rows, questions, by_label, found, texts)


def correctness(row: Row, questions: Questions) -> Correctness:
    """Compare the predictions of a row's seeds with the annotated answers.

    Raises:
        SourceError: Predictions are missing, damaged or about other questions.
    """
    answers = [read_answers(run.dir, questions) for run in row.runs]
    right = [{q: same_lower_cased(question, seed[q]) for q, question in questions.by_id.items()} for seed in answers]
    return Correctness(np.array([list(seed.values()) for seed in right], dtype=bool), right[0], answers[0])


def text_scores(rows: Sequence[Row], questions: Questions, problems: list[str]) -> dict[str, dict[str, Interval]]:
    """Text metrics of the answers, by label, mean over seeds; empty unless the data set has free answers.

    They are empty too if a library is missing; then a line in `problems` names it.

    Args:
        rows: Rows whose predictions can be read.
    """
    scores = {}
    for row in rows if questions.free_answers else ():
        try:
            answers = [read_answers(run.dir, questions) for run in row.runs]
            scores[row.label] = text_intervals(tuple(questions.by_id.values()), answers)
        except TextMetricsError as error:
            problems.append(f"no BLEU-4, METEOR and ROUGE-L: {error}")
            return {}
    return scores


def accuracy_mismatches(row: Row, correct: Correctness, questions: Questions) -> list[str]:
    """One line for each run of a row whose predictions do not reproduce its recorded accuracies."""
    lines = []
    masks = column_masks(questions.by_id.values())
    for run, hits in zip(row.runs, correct.by_seed, strict=True):
        for column in ("all", "open", "binary"):
            recorded = run.scores[column].accuracy
            if recorded is None or column not in masks:
                continue
            counted = 100 * float(hits[masks[column]].mean())
            if not _same_mean(recorded, counted):
                asked = "" if column == "all" else f" on {column} questions"
                lines.append(
                    f"{run.dir}: {PREDICTIONS} gives {counted:.2f}{asked} but {TEST} has {recorded:.2f}; "
                    "the annotations or the files have changed since; evaluate the run again"
                )
                break
    return lines


def _same_mean(recorded: float | None, counted: float) -> bool:
    """Whether two accuracies are equal to the digits that the table shows."""
    return recorded is not None and abs(recorded - counted) < 0.005


def read_answers(folder: Path, questions: Questions) -> dict[str, str]:
    """Read the answers of a run to the questions that count, by question id.

    Raises:
        SourceError: Predictions are missing, damaged or about other questions.
    """
    try:
        answers = read_predictions(folder / PREDICTIONS, (*questions.by_id.values(), *questions.unpublished))
    except PredictionError as error:
        raise SourceError(f"{_first_line(error)}; evaluate the run again, or give the config of these runs") from error
    return {question_id: answers[question_id] for question_id in questions.by_id}


def _first_line(error: Exception) -> str:
    """The first line of an error, and how many more there are."""
    first, *more = str(error).splitlines() or [type(error).__name__]
    return f"{first} (and {len(more)} more)" if more else first


def column_masks(questions: Iterable[Question]) -> dict[str, NDArray[np.bool_]]:
    """Which of the questions each column of the table counts, [Q]; columns without questions are left out."""
    forms = np.array([question.form for question in questions])
    masks = {column: np.full(len(forms), column == "all") | (forms == column) for column in COLUMNS}
    return {column: counted for column, counted in masks.items() if counted.any()}


def intervals(row: Row, correct: Correctness, questions: Questions) -> dict[str, Interval]:
    """The interval of each accuracy of a row that has questions, by column, or `tag X` for the tag X.

    A recorded accuracy that differs from that of the answers gets none: the interval would describe another number.
    """
    clips, masks = np.array(questions.clip_ids), column_masks(questions.by_id.values())
    tags = [question.tags for question in questions.by_id.values()]
    for tag in sorted({tag for question_tags in tags for tag in question_tags}):
        masks[f"tag {tag}"] = np.array([tag in question_tags for question_tags in tags])
    found = {part: accuracy(correct.by_seed[:, counted], clips[counted].tolist()) for part, counted in masks.items()}
    return {name: interval for name, interval in found.items() if _same_mean(row.mean(name), interval.mean)}
