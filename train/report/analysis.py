"""What the report says about one split: per-question correctness, paired differences with intervals, tags, examples."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip, DatasetError, Question, load_dataset
from egopatch.extract.encoders import find_network
from egopatch.train.report import examples
from egopatch.train.report.sources import Selection, SourceError, Sweep, read_selection
from egopatch.train.rundir.results import BLIND, SPLITS, Row
from egopatch.train.scores.metrics import PredictionError, normalise, read_predictions

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
    """Of one row of the table: right or wrong on each test question, and the answers of the seed best on val.

    Attributes:
        share: share of the seeds that are right, by question id.
        right: whether the seed best on val is right.
        answers: what it answered.
    """

    share: Mapping[str, float]
    right: Mapping[str, bool]
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Gain:
    """How far one system is above another, in points of accuracy over all questions.

    Attributes:
        other: the system compared with.
        points: difference.
        low: lower end of the 95% interval; None where predictions are missing.
        high: upper end.
    """

    other: str
    points: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TagLine:
    """One tag of the breakdown: questions, and accuracy in percent by row label."""

    family: str
    tag: str
    n: int
    accuracy: Mapping[str, float]


def load_questions(config: Config, split: str) -> Questions:
    """Test questions of `split` as the annotations have them.

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
        SourceError: predictions are missing, damaged or of other questions.
    """
    seeds = []
    for run in row.runs:
        answers = answers_of(run.dir, questions)
        seeds.append((answers, {q: same_answer(a, questions.by_id[q].answer) for q, a in answers.items()}))
    answers, right = seeds[0]
    share = {q: float(np.mean([seed.get(q, False) for _, seed in seeds])) for q in right}
    return Correctness(share, right, answers)


def recount(row: Row, right: Correctness) -> str:
    """One line if a row's predictions do not add up to its recorded accuracy; empty if they do."""
    recorded = row.best.scores["all"].accuracy
    counted = 100 * sum(right.right.values()) / max(len(right.right), 1)
    if recorded is None or abs(recorded - counted) < 0.005:
        return ""
    return (
        f"{row.best.dir}: predictions.jsonl counts to {counted:.2f}, test.json says {recorded:.2f}; "
        "the annotations or the files have changed since: evaluate it again"
    )


def answers_of(folder: Path, questions: Questions) -> dict[str, str]:
    """Answers of a run by question id.

    Raises:
        SourceError: predictions are missing, damaged or of other questions.
    """
    try:
        return read_predictions(folder / "predictions.jsonl", tuple(questions.by_id.values()))
    except PredictionError as error:
        first, *more = str(error).splitlines()
        rest = f" (and {len(more)} more)" if more else ""
        raise SourceError(f"{first}{rest}; was the report given the config of these runs?") from error


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are the same, as the metrics compare them."""
    return normalise(given) == normalise(expected)


def gain(
    ours: tuple[Row, Correctness | None], other: tuple[Row, Correctness | None], questions: Questions | None
) -> Gain | None:
    """Difference of two rows with its paired bootstrap interval over clips; None where one has no accuracy."""
    mean, base = ours[0].mean("all"), other[0].mean("all")
    if mean is None or base is None:
        return None
    interval = None
    if questions and ours[1] and other[1]:
        shared = sorted(ours[1].share.keys() & other[1].share.keys())
        difference = np.array([ours[1].share[q] - other[1].share[q] for q in shared])
        interval = paired_interval(difference, [questions.by_id[q].clip_id for q in shared])
    low, high = interval or (None, None)
    return Gain(other[0].label, mean - base, low, high)


def paired_interval(difference: np.ndarray, clips: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """95% bootstrap interval, in points, of the mean of `difference` over questions.

    Clips are drawn rather than questions, because questions about one clip are not independent.

    Args:
        difference: [Q] in [-1, 1].
        clips: clip of each question.
        seed: of the draws.
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


def better_blind(rows: Iterable[Row]) -> Row | None:
    """The blind baseline with the higher accuracy."""
    blind = [row for row in rows if row.system in BLIND and row.mean("all") is not None]
    return max(blind, key=lambda row: row.mean("all") or 0.0, default=None)


def tag_lines(rows: Sequence[Row]) -> list[TagLine]:
    """Accuracy of every row on every tag: mean over seeds, families in the order of the paper, others last."""
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


def selections(
    row: Row, sweeps: Sequence[Sweep], questions: Questions
) -> tuple[dict[str, tuple[Selection, Mapping[str, str]]], list[str]]:
    """Selections of a row's best seed and of the sweep's members, by ratio, each with that head's answers.

    The row's own comes first and stands for its ratio; of a sweep's seeds the lowest is taken. Members without a
    recorded selection are passed over.

    Returns:
        By label such as `0.25`; and one line for each damaged file.
    """
    problems: list[str] = []
    found: dict[str, tuple[Selection, Mapping[str, str]]] = {}
    places = [(ratio_label(row), row.best.dir)]
    for sweep in sweeps:
        if sweep.split == row.split and sweep.system == row.system:
            members = sorted((m for m in sweep.members if not m.setting), key=lambda m: (m.ratio, m.seed))
            places += [(f"{m.ratio:g}", m.dir) for m in members if m.dir and (m.dir / "selection.npz").exists()]
    for label, folder in places:
        if label in found:
            continue
        try:
            found[label] = read_selection(folder / "selection.npz"), answers_of(folder, questions)
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
    row, own = ours
    chosen = examples.choose(
        sorted(own.right),
        own.right,
        [other.right for _, other in others],
        EXAMPLES_OF_A_KIND,
        clips={q: questions.by_id[q].clip_id for q in own.right},
    )
    asked = [questions.by_id[question] for _, question in chosen]
    clips = [questions.clips[question.clip_id] for question in asked]
    shown = examples.pictures(clips, config.video, find_network(config.encoder.arch).transform)
    result = []
    for (kind, _), question, (pictures, missing) in zip(chosen, asked, shown):
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
    right = given is not None and same_answer(given, question.answer)
    return examples.Step(label, overlays, examples.Answer(system, given, right))
