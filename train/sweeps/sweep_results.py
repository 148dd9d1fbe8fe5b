"""Results of a sweep: its runs, its points over seeds and questions, and a comparison of each point with the first.

`sweep.json` holds all results, `sweep.csv` one line per point, `sweep.png` the plot.
"""

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Question, load_dataset
from egopatch.features.common.units import counted
from egopatch.train.report.answers import column_masks
from egopatch.train.report.sources import read_sweep
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.names import CONFIG, PREDICTIONS, SUBMISSION, SWEEP, SWEEP_CSV, SWEEP_PNG
from egopatch.train.rundir.results import COLUMNS, read_run, value_text
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.scores.metrics import PredictionError, read_predictions, same_lower_cased
from egopatch.train.scores.statistics import Matrix, accuracy, compare, measure_power
from egopatch.train.sweeps.axes import PlannedRun

SEED = "train.seed"
# Differences, in points, for which a sweep reports how many seeds would detect them.
DIFFERENCES = (1, 3, 5)


class Point(NamedTuple):
    """One setting with all its seeds: its entry in `sweep.json`, and which answers are right, [seeds, questions]."""

    summary: dict[str, Any]
    right: Matrix


def write_results(facts: Mapping[str, Any], runs: Sequence[PlannedRun], config: Config, out: Path) -> Path:
    """Write the three files into `out`; returns the path of `sweep.json`.

    Args:
        facts: Facts about the sweep for the JSON.
        runs: The finished runs.
        config: Config that all runs share.
    """
    asked = load_dataset(config.data).questions["test"]
    questions = [question for question in asked if question.counts]
    right = {run.folder: _right(run.folder, asked) for run in runs} if questions else {}
    points = gather_points(runs, questions, right) if questions else []
    result = {
        **facts,
        "members": [_record(run, out, questions, right.get(run.folder)) for run in runs],
        "points": [point.summary for point in points],
        "comparisons": compare_points(points, questions),
        "seeds_needed": seeds_needed(points, questions),
    }
    run_folder.write_whole(out / SWEEP, json.dumps(result, indent=2) + "\n")
    run_folder.write_whole(out / SWEEP_CSV, as_csv(result["points"]))
    if points:
        _draw(out, config.data.title)
    if not questions:
        print(
            f"  none of {counted(len(asked), 'test question')} has a published answer, so there are no accuracies and "
            f"no plot: the answers are in the runs' folders, also as {SUBMISSION}",
            flush=True,
        )
    for line in describe(result):
        print(line, flush=True)
    return out / SWEEP


def gather_points(
    runs: Sequence[PlannedRun], questions: Sequence[Question], right: Mapping[Path, Matrix]
) -> list[Point]:
    """The points of a sweep.

    Args:
        runs: The finished runs.
        questions: The test questions that count, at least one.
        right: Which answers of each run are right, [questions], by the run's folder.
    """
    settings: dict[str, list[PlannedRun]] = {}
    for run in runs:
        settings.setdefault(json.dumps(_setting(run), default=str), []).append(run)
    masks = column_masks(questions)
    clips = np.array([question.clip_id for question in questions])
    points = []
    for unsorted in settings.values():
        seeds = sorted(unsorted, key=lambda run: run.config.train.seed)
        right_by_seed = np.array([right[run.folder] for run in seeds])
        summary: dict[str, Any] = {
            "setting": _setting(seeds[0]),
            "ratio": seeds[0].config.head.ratio,
            "seeds": [run.config.train.seed for run in seeds],
        }
        summary |= dict.fromkeys(COLUMNS)
        for column, mask in masks.items():
            interval = accuracy(right_by_seed[:, mask], clips[mask].tolist())
            summary[column] = {**asdict(interval), "n": int(mask.sum())}
        points.append(Point(summary, right_by_seed))
    return points


def compare_points(points: Sequence[Point], questions: Sequence[Question]) -> list[Any]:
    """Compare each later point with the first, in points of accuracy over `questions`, all of which count."""
    clips = [question.clip_id for question in questions]
    comparisons = []
    for point in points[1:]:
        result = compare(point.right, points[0].right, clips)
        difference = result.difference
        comparisons.append(
            {
                "setting": point.summary["setting"],
                "against": points[0].summary["setting"],
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "p": result.p,
                "verdict": result.verdict,
            }
        )
    return comparisons


def seeds_needed(points: Sequence[Point], questions: Sequence[Question]) -> dict[str, int | None] | None:
    """Seeds per point that find a difference of 1, 3 and 5 points in 80% of cases; None for one that needs more
    questions. The whole result is None without two points of at least two seeds, or if all points answer
    alike.
    """
    power = measure_power([point.right for point in points], [question.clip_id for question in questions])
    return None if power is None else {str(size): power.seeds_needed(size) for size in DIFFERENCES}


def as_csv(points: Sequence[Mapping[str, Any]]) -> str:
    """One line per point."""
    options = list(dict.fromkeys(option for point in points for option in point["setting"]))
    numbers = [f"{column}_{number}" for column in COLUMNS for number in ("mean", "low", "high", "n")]
    content = io.StringIO()
    writer = csv.DictWriter(content, [*options, "seeds", *numbers], lineterminator="\n")
    writer.writeheader()
    for point in points:
        line = {option: value_text(point["setting"].get(option)) for option in options}
        line["seeds"] = str(len(point["seeds"]))
        for column in COLUMNS:
            for number, value in (point[column] or {}).items():
                line[f"{column}_{number}"] = f"{value:.4f}" if isinstance(value, float) else str(value)
        writer.writerow(line)
    return content.getvalue()


def describe(result: Mapping[str, Any]) -> list[str]:
    """One line per point, one per comparison, and one on the number of seeds that comparisons need."""
    lines = []
    for point in result["points"]:
        accuracies = [
            f"{column} {point[column]['mean']:.2f} [{point[column]['low']:.2f}, {point[column]['high']:.2f}]"
            for column in COLUMNS
            if point[column]
        ]
        seeds = counted(len(point["seeds"]), "seed")
        lines.append(f"  {_name(point['setting'])}: {', '.join(accuracies)}, {seeds}")
    lines += [
        f"  {_name(pair['setting'])} against {_name(pair['against'])}: {pair['difference']:+.2f} "
        f"[{pair['low']:+.2f}, {pair['high']:+.2f}], {pair['verdict']} (p {pair['p']:.4f})"
        for pair in result["comparisons"]
    ]
    if needed := result["seeds_needed"]:
        parts = [f"{points}: {'more clips' if seeds is None else seeds}" for points, seeds in needed.items()]
        lines.append(f"  seeds needed to find a difference 4 times in 5, by its size in points: {', '.join(parts)}")
    return lines


def _setting(run: PlannedRun) -> dict[str, Any]:
    """The options that identify a run's point: all but the seed."""
    return {option: value for option, value in run.overrides.items() if option != SEED}


def _right(folder: Path, asked: Sequence[Question]) -> Matrix:
    """For each of the questions that count, 1 if the run in `folder` answers it right, else 0."""
    try:
        answers = read_predictions(folder / PREDICTIONS, asked)
    except PredictionError as error:
        first, *more = str(error).splitlines()
        rest = f" and {len(more)} more" if more else ""
        raise RunError(
            f"{folder} does not answer these test questions ({first}{rest}); they have changed since it was evaluated, "
            f"or the file is damaged; evaluate it again: egopatch train evaluate --config "
            f"{shlex.quote(str(folder / CONFIG))}"
        ) from None
    questions = [question for question in asked if question.counts]
    return np.array([same_lower_cased(question, answers[question.question_id]) for question in questions], dtype=float)


def _record(run: PlannedRun, out: Path, questions: Sequence[Question], right: Matrix | None) -> dict[str, Any]:
    try:
        scores = read_run(run.folder).scores
    except ValueError as error:
        raise RunError(f"{run.folder}: {error}") from None
    accuracies = {column: scores[column].accuracy for column in COLUMNS}
    if right is not None:  # counted like the points: the annotations may have changed since `test.json` was written
        masks = column_masks(questions)
        accuracies |= {column: 100 * int(right[mask].sum()) / int(mask.sum()) for column, mask in masks.items()}
    return {
        "ratio": run.config.head.ratio,
        "seed": run.config.train.seed,
        "overrides": dict(run.overrides),
        **accuracies,
        "n": len(questions),
        "dir": run.folder.relative_to(out).as_posix(),
    }


def _draw(out: Path, title: str) -> None:
    # Imported here to save start-up time: matplotlib takes a second, and training does not use it.
    from egopatch.train.report import plots

    sweep = replace(read_sweep(out / SWEEP), split=title)  # other data sets have no split, so the plot shows the title
    plots.save(plots.draw_ratio([sweep], {}) if sweep.varies_ratio else plots.draw_settings(sweep), out / SWEEP_PNG)


def _name(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{option} {value_text(value)}" for option, value in setting.items()) or "the config"
