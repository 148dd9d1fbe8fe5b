"""Analysis of one split for the report: correctness per question, paired differences with intervals, tags, examples."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip, DatasetError, Question, load_dataset
from egopatch.extract.encoders import input_transform
from egopatch.train.report import examples
from egopatch.train.report.sources import Selection, SourceError, Sweep, read_selection
from egopatch.train.rundir.results import BLIND, SPLITS, Row
from egopatch.train.scores.metrics import PredictionError, read_predictions, same_lower_cased

EXAMPLES_OF_A_KIND = 4
_DRAWS = 2000
# The families of EgoTaskQA's reasoning tags, in the order of its paper.
TAG_FAMILIES = {
    "scope": ("world", "intent", "multi-agent"),
    "category": ("descriptive", "predictive", "explanatory", "counterfactual"),
    "semantics": ("action", "object", "state", "change"),
    "structure": ("query", "verify"),
    "reference": ("direct", "indirect"),
}


@dataclass(frozen=True)
class Questions:
    """Test questions and clips of one split, by id."""

    by_id: Mapping[str, Question]
    clips: Mapping[str, Clip]


@dataclass(frozen=True)
class Correctness:
    """Right and wrong answers of one row of the table, by question id.

    Attributes:
        share: Share of the seeds whose answer is right.
        right: Whether the answer of the seed best on val is right.
        answers: Answers of the seed best on val.
    """

    share: Mapping[str, float]
    right: Mapping[str, bool]
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Gain:
    """How far one system is above another, in points of accuracy over all questions.

    Attributes:
        other: Label of the system compared with.
        points: Difference in points.
        low: Lower end of the 95% interval; None if predictions are missing.
        high: Upper end.
    """

    other: str
    points: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TagLine:
    """One tag of the breakdown: its number of questions, and the accuracy in percent by row label."""

    family: str
    tag: str
    n: int
    accuracy: Mapping[str, float]


def load_questions(config: Config, split: str) -> Questions:
    """Load the test questions of `split`.

    Raises:
        SourceError: the annotations cannot be read.
    """
    try:
        known = next((name for name in SPLITS if name == split), config.data.split)
        dataset = load_dataset(dataclasses.replace(config.data, split=known))
    except (DatasetError, OSError) as error:
        first, *more = str(error).splitlines() or [type(error).__name__]
        rest = f" (and {len(more)} more)" if more else ""
        raise SourceError(f"data.root {config.data.root}: {first}{rest}") from error
    return Questions(
        {question.question_id: question for question in dataset.questions["test"]},
        {clip.clip_id: clip for clip in dataset.clips},
    )


def correctness(row: Row, questions: Questions) -> Correctness:
    """Compare the predictions of a row's seeds with the annotated answers.

    Raises:
        SourceError: predictions are missing, damaged or about other questions.
    """
    seeds = []
    for run in row.runs:
        answers = read_answers(run.dir, questions)
        seeds.append((answers, {q: same_lower_cased(questions.by_id[q], a) for q, a in answers.items()}))
    answers, right = seeds[0]
    share = {q: float(np.mean([seed.get(q, False) for _, seed in seeds])) for q in right}
    return Correctness(share, right, answers)


def accuracy_mismatch(row: Row, right: Correctness) -> str:
    """One line if a row's predictions do not give its recorded accuracy; empty if they do."""
    recorded = row.best.scores["all"].accuracy
    counted = 100 * sum(right.right.values()) / max(len(right.right), 1)
    if recorded is None or abs(recorded - counted) < 0.005:
        return ""
    return (
        f"{row.best.dir}: predictions.jsonl gives {counted:.2f} but test.json has {recorded:.2f}; "
        "the annotations or the files have changed since; evaluate the run again"
    )


def read_answers(folder: Path, questions: Questions) -> dict[str, str]:
    """Read the answers of a run, by question id.

    Raises:
        SourceError: predictions are missing, damaged or about other questions.
    """
    try:
        return read_predictions(folder / "predictions.jsonl", tuple(questions.by_id.values()))
    except PredictionError as error:
        first, *more = str(error).splitlines()
        rest = f" (and {len(more)} more)" if more else ""
        raise SourceError(f"{first}{rest}; give the report the config of these runs") from error


def gain(
    ours: tuple[Row, Correctness | None], other: tuple[Row, Correctness | None], questions: Questions | None
) -> Gain | None:
    """Difference of two rows with its paired bootstrap interval over clips; None if one has no accuracy."""
    mean, base = ours[0].mean("all"), other[0].mean("all")
    if mean is None or base is None:
        return None
    interval = None
    if questions and ours[1] and other[1]:
        shared = sorted(ours[1].share.keys() & other[1].share.keys())
        difference = np.array([ours[1].share[q] - other[1].share[q] for q in shared])
        interval = paired_clip_interval(difference, [questions.by_id[q].clip_id for q in shared])
    low, high = interval or (None, None)
    return Gain(other[0].label, mean - base, low, high)


def paired_clip_interval(difference: np.ndarray, clips: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """95% bootstrap interval, in points, of the mean of `difference` over questions.

    Clips are drawn rather than questions, because questions about one clip are not independent. Unlike
    `train.scores.statistics.bootstrap` it does not draw seeds.

    Args:
        difference: [Q] in [-1, 1].
        clips: Clip of each question.
        seed: Seed of the draws.
    """
    if len(difference) == 0:
        return None
    _, clip_index = np.unique(np.asarray(clips), return_inverse=True)
    sums = np.bincount(clip_index, weights=difference)
    counts = np.bincount(clip_index).astype(float)
    generator = np.random.default_rng(seed)
    means = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        weights = np.bincount(generator.integers(len(sums), size=len(sums)), minlength=len(sums))
        means[draw] = (weights @ sums) / (weights @ counts)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return float(low), float(high)


def best_blind_row(rows: Iterable[Row]) -> Row | None:
    """The row of the blind baseline with the higher accuracy; None without one."""
    blind = [row for row in rows if row.system in BLIND and row.mean("all") is not None]
    return max(blind, key=lambda row: row.mean("all") or 0.0, default=None)


def tag_lines(rows: Sequence[Row]) -> list[TagLine]:
    """Accuracy of every row on every tag, mean over seeds: families in the order of the paper, other tags last."""
    found = sorted({tag for row in rows for run in row.runs for tag in run.tags})
    family_of = {tag: family for family, tags in TAG_FAMILIES.items() for tag in tags}
    known = [tag for tags in TAG_FAMILIES.values() for tag in tags if tag in found]
    lines = []
    for tag in (*known, *(tag for tag in found if tag not in family_of)):
        accuracy = {}
        for row in rows:
            values = [run.tags[tag].accuracy for run in row.runs if tag in run.tags]
            present = [value for value in values if value is not None]
            if present:
                accuracy[row.label] = float(np.mean(present))
        n = max(run.tags[tag].n for row in rows for run in row.runs if tag in run.tags)
        lines.append(TagLine(family_of.get(tag, "other"), tag, n, accuracy))
    return lines


def selections_by_ratio(
    row: Row, sweeps: Sequence[Sweep], questions: Questions
) -> tuple[dict[str, tuple[Selection, Mapping[str, str]]], list[str]]:
    """Selections of a row's best seed and of the runs of sweeps, by ratio, each with the answers of its head.

    The selection of the row comes first, for its ratio; of the other ratios the run with the lowest seed counts. Runs
    without a recorded selection are ignored.

    Returns:
        Selections and answers by label, such as `0.25`, and one line for each damaged file.
    """
    problems: list[str] = []
    found: dict[str, tuple[Selection, Mapping[str, str]]] = {}
    folders = [(ratio_label(row), row.best.dir)]
    for sweep in sweeps:
        if sweep.split == row.split and sweep.system == row.system:
            runs = sorted((run for run in sweep.runs if not run.setting), key=lambda run: (run.ratio, run.seed))
            folders += [(f"{r.ratio:g}", r.dir) for r in runs if r.dir and (r.dir / "selection.npz").exists()]
    for label, folder in folders:
        if label in found:
            continue
        try:
            found[label] = read_selection(folder / "selection.npz"), read_answers(folder, questions)
        except SourceError as error:
            problems.append(str(error))
    return found, problems


def ratio_label(row: Row) -> str:
    """The selection ratio of a row's head, as the page writes it."""
    return f"{float(row.best.options.get('head.ratio', 0)):g}"


def build_examples(
    config: Config,
    questions: Questions,
    ours: tuple[Row, Correctness],
    others: Sequence[tuple[Row, Correctness]],
    kept: Mapping[str, tuple[Selection, Mapping[str, str]]],
    grid: tuple[int, int],
) -> list[examples.Example]:
    """Choose a split's examples and draw them."""
    row, correct = ours
    chosen = examples.choose(
        sorted(correct.right),
        correct.right,
        [other.right for _, other in others],
        EXAMPLES_OF_A_KIND,
        clips={q: questions.by_id[q].clip_id for q in correct.right},
    )
    chosen_questions = [questions.by_id[question] for _, question in chosen]
    clips = [questions.clips[question.clip_id] for question in chosen_questions]
    transform = input_transform(config.encoder.arch, config.encoder.checkpoint, config.video.size)
    shown = examples.pictures(clips, config.video, transform)
    result = []
    for (kind, _), question, (pictures, missing) in zip(chosen, chosen_questions, shown):
        answers = [
            examples.Answer(other.label, c.answers.get(question.question_id), c.right.get(question.question_id, False))
            for other, c in (ours, *others)
        ]
        steps = [
            step
            for label, (selection, predictions) in kept.items()
            if (step := _step(label, selection, predictions, question, row.label, grid)) is not None
        ]
        steps.sort(key=lambda step: float(step.label))
        result.append(examples.Example(kind, question, pictures, missing, tuple(steps), tuple(answers)))
    return result


def _step(
    label: str,
    selection: Selection,
    predictions: Mapping[str, str],
    question: Question,
    system: str,
    grid: tuple[int, int],
) -> examples.Step | None:
    index = selection.rows.get(question.question_id)
    if index is None:
        return None
    kept = selection.kept[index]
    overlays = tuple(examples.overlay(kept[t], grid) for t in examples.shown_frames(len(kept)))
    given = predictions.get(question.question_id)
    right = given is not None and same_lower_cased(question, given)
    return examples.Step(label, overlays, examples.Answer(system, given, right))
