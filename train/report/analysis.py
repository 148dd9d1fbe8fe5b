"""Analysis of one split for the report: the headline row, its rivals, tags, selections and examples."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Clip, Question
from egopatch.extract.datasets.egosynth.places import Places
from egopatch.extract.encoders import input_transform
from egopatch.extract.errors import CheckpointError
from egopatch.features.values.spec import middle_indices
from egopatch.train.explanation.agreement import Agreement, agreement_of, known_places
from egopatch.train.report import examples
from egopatch.train.report.answers import Questions, SplitAnswers, read_answers
from egopatch.train.report.sources import Selection, SourceError, Sweep, read_selection
from egopatch.train.report.table import is_standin
from egopatch.train.rundir.checked_json import typed
from egopatch.train.rundir.names import CARD, SELECTION
from egopatch.train.rundir.results import BLIND, OURS, START_AGAIN, Row
from egopatch.train.rundir.run_folder import plain
from egopatch.train.scores.metrics import same_lower_cased

EXAMPLES_OF_A_KIND = 4
# The families of EgoTaskQA's reasoning tags, in the order of its paper.
TAG_FAMILIES = {
    "scope": ("world", "intent", "multi-agent"),
    "category": ("descriptive", "predictive", "explanatory", "counterfactual"),
    "semantics": ("action", "object", "state", "change"),
    "structure": ("query", "verify"),
    "reference": ("direct", "indirect"),
}


@dataclass(frozen=True)
class TagLine:
    """One tag of the breakdown: its number of questions, and the accuracy in percent by row label."""

    family: str
    tag: str
    n: int
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class KeptPatches:
    """The patches that a head kept at one ratio, and its answers by question id."""

    selection: Selection
    answers: Mapping[str, str]


def headline_row(rows: Sequence[Row]) -> Row:
    """The row that the page is about: psa if it was run, else the best head that reads video.

    Rows on real encoder weights come before those on random stand-ins, the table's main setting comes before others,
    then accuracy on val decides.
    """

    def rank(row: Row) -> tuple[bool, bool, bool, bool, float]:
        val = [run.val for run in row.runs if run.val is not None]
        mean = float(np.mean(val)) if val else -math.inf
        return row.head in OURS, row.head not in BLIND, not is_standin(row.best.card), row.label == row.system, mean

    return max(rows, key=rank)


def rivals(rows: Sequence[Row], ours: Row) -> list[Row]:
    """The rows that the headline is compared with: the better blind baseline, and every other head."""
    blind = best_blind_row(rows)
    heads = [row for row in rows if row.head not in (*BLIND, ours.head) and row.label == row.system]
    return [row for row in (blind, *heads) if row is not None and row is not ours]


def config_of(row: Row, config: Config) -> Config:
    """`config` with the videos, the encoder and the store of the row's best run, as its card has them.

    Raises:
        SourceError: An option in the card has the wrong type.
    """
    of_run, now = row.best.card.get("config") or {}, plain(config)
    # All decoders give the same frames, and this one runs everywhere.
    read = {
        "video": {**of_run.get("video", {}), "decoder": "pyav"},
        "encoder": {name: of_run.get("encoder", {}).get(name, now["encoder"][name]) for name in ("arch", "checkpoint")},
        "store": {"path": of_run.get("store", {}).get("path", now["store"]["path"])},
    }
    try:
        sections = {
            name: typed(type(getattr(config, name)), name, {o: options.get(o, now[name][o]) for o in now[name]})
            for name, options in read.items()
        }
        return replace(config, **sections)
    except ValueError as error:
        raise SourceError(f"{row.best.dir / CARD} is damaged ({error}); {START_AGAIN}") from None


def best_blind_row(rows: Iterable[Row]) -> Row | None:
    """The blind baseline's row with the highest accuracy; None if there is none."""
    blind = [row for row in rows if row.system in BLIND and row.mean("all") is not None]
    return max(blind, key=lambda row: row.mean("all") or 0.0, default=None)


def tag_lines(rows: Sequence[Row]) -> list[TagLine]:
    """Accuracy of every row on every tag, mean over seeds: families in the order of the paper, other tags last."""
    runs = [run for row in rows for run in row.runs]
    found = sorted({part.removeprefix("tag ") for run in runs for part in run.scores if part.startswith("tag ")})
    family_of = {tag: family for family, tags in TAG_FAMILIES.items() for tag in tags}
    known = [tag for tags in TAG_FAMILIES.values() for tag in tags if tag in found]
    lines = []
    for tag in (*known, *(tag for tag in found if tag not in family_of)):
        accuracy = {row.label: mean for row in rows if (mean := row.mean(f"tag {tag}")) is not None}
        n = max(run.scores[f"tag {tag}"].n for run in runs if f"tag {tag}" in run.scores)
        lines.append(TagLine(family_of.get(tag, "other"), tag, n, accuracy))
    return lines


def kept_by_ratio(
    row: Row, sweeps: Sequence[Sweep], questions: Questions, problems: list[str]
) -> dict[str, KeptPatches]:
    """The patches that a row's best seed and the runs of sweeps kept, by ratio.

    For the row's own ratio, its selection is used; for other ratios, that of the run with the lowest seed. Runs without
    a recorded selection are ignored. Labels are such as `0.25`; each damaged file adds one line to `problems`.
    """
    found: dict[str, KeptPatches] = {}
    # Only psa records a selection, so only a row of psa can miss one.
    folders = [(ratio_label(row), row.best.dir)] if row.head in OURS else []
    for sweep in sweeps:
        if sweep.split == row.split and sweep.system == row.system:
            runs = sorted((run for run in sweep.runs if not run.setting), key=lambda run: (run.ratio, run.seed))
            folders += [(f"{r.ratio:g}", r.dir) for r in runs if r.dir and (r.dir / SELECTION).exists()]
    for label, folder in folders:
        if label in found:
            continue
        try:
            found[label] = KeptPatches(read_selection(folder / SELECTION), read_answers(folder, questions))
        except SourceError as error:
            problems.append(str(error))
    return found


def ratio_label(row: Row) -> str:
    """The selection ratio of a row's head, as the page writes it."""
    return f"{float(row.best.options.get('head.ratio', 0)):g}"


def build_examples(
    config: Config, answers: SplitAnswers, ours: Row, kept: Mapping[str, KeptPatches], grid: tuple[int, int]
) -> list[examples.Example]:
    """Choose a split's examples and draw them."""
    questions = answers.questions
    others = {label: correct for label, correct in answers.correctness.items() if label != ours.label}
    systems = {ours.label: answers.correctness[ours.label], **others}
    clip_of = {q: question.clip_id for q, question in questions.by_id.items()}
    chosen = examples.choose(clip_of, systems[ours.label].right, [c.right for c in others.values()], EXAMPLES_OF_A_KIND)
    chosen_questions = [questions.by_id[question] for _, question in chosen]
    clips = [questions.clips[question.clip_id] for question in chosen_questions]
    shown = _pictures(clips, config, frames_read(ours, config))
    result = []
    for (kind, _), question, (pictures, missing) in zip(chosen, chosen_questions, shown):
        given = [
            examples.Answer(label, c.answers[question.question_id], c.right[question.question_id])
            for label, c in systems.items()
        ]
        steps = [
            step
            for label, at_ratio in kept.items()
            if (step := _step(label, at_ratio, question, ours.label, grid)) is not None
        ]
        steps.sort(key=lambda step: float(step.label))
        result.append(examples.Example(kind, question, pictures, missing, tuple(steps), tuple(given)))
    return result


def frames_read(row: Row, config: Config) -> list[int]:
    """Indices of the frames that a row's head reads, among those that the encoder saw."""
    read = row.best.options.get("head.frames")
    return middle_indices(config.video.frames, config.video.frames if read is None else int(read))


def frames_chosen_from(row: Row, config: Config) -> int | None:
    """The number of frames if a row's head reads only some of them; None if it reads all."""
    return None if row.best.options.get("head.frames") is None else config.video.frames


def agreement(
    selection: Selection, questions: Questions, grid: tuple[int, int], frames: int | None = None
) -> Agreement | None:
    """Agreement of a selection with the known places; None if no question is about a clip of EgoSynth.

    Args:
        selection: Kept patches [Q, T, k].
        grid: Rows and columns of patches in a frame.
        frames: Number of stored frames, if the head reads T evenly spaced ones of them; None if it reads all.
    """

    def known() -> Iterator[tuple[NDArray, Places]]:
        for name, row in selection.rows.items():
            if (question := questions.by_id.get(name)) is not None:
                kept = selection.kept[row]
                stored = len(kept) if frames is None else frames
                places = known_places(question, stored, middle_indices(stored, len(kept)), grid)
                if places is not None:
                    yield kept, places

    return agreement_of(known(), grid[0] * grid[1])


def _pictures(clips: Sequence[Clip], config: Config, frames: Sequence[int]) -> Iterable[tuple[tuple[str, ...], str]]:
    """As `examples.pictures`; if the encoder's transform is unknown here, every clip gets that reason."""
    try:
        transform = input_transform(config.encoder.arch, config.encoder.checkpoint, config.video.size)
    except (CheckpointError, ConfigError, OSError) as error:
        return [((), " ".join(str(error).split()))] * len(clips)
    return examples.pictures(clips, config.video, transform, frames)


def _step(
    label: str, kept: KeptPatches, question: Question, system: str, grid: tuple[int, int]
) -> examples.Step | None:
    index = kept.selection.rows.get(question.question_id)
    if index is None:
        return None
    patches = kept.selection.kept[index]
    overlays = tuple(examples.overlay(patches[t], grid) for t in examples.shown_frames(len(patches)))
    given = kept.answers[question.question_id]
    return examples.Step(label, overlays, examples.Answer(system, given, same_lower_cased(question, given)))
