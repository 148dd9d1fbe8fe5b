"""The report: one self-contained HTML page about a folder of runs.

The page loads nothing from outside and trusts no data: text is escaped, pictures are data URIs, and the
Content-Security-Policy allows only the page's own style and script, by their hashes.
"""

import base64
import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from egopatch.configs.schema import Config
from egopatch.features.common.units import counted, format_bytes
from egopatch.train.explanation.agreement import Agreement
from egopatch.train.explanation.record import Explanation, ExplanationError, read_explanation
from egopatch.train.report import analysis as report_analysis
from egopatch.train.report import integrity as report_integrity
from egopatch.train.report import table
from egopatch.train.report.analysis import TagLine
from egopatch.train.report.answers import Questions, SplitAnswers, read_split
from egopatch.train.report.examples import Example
from egopatch.train.report.plots import spaced, thin
from egopatch.train.report.sections import question_list, repeat
from egopatch.train.report.sections.charts import COLOURS, Bar, Chart, Line, bar_chart, heat_map, line_chart
from egopatch.train.report.sources import Selection, SourceError, Sweep, TrainingLog, read_log, read_sweep
from egopatch.train.rundir.names import SWEEP, SWEEPS
from egopatch.train.rundir.results import BLIND, COLUMNS, SPLITS, Results, Row, gather
from egopatch.train.rundir.run_folder import write_whole
from egopatch.train.scores.statistics import Comparison, compare
from egopatch.train.scores.text_metrics import NAMES

TEMPLATES = Path(__file__).parent / "templates"
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Gain:
    """The lead of the headline row over the row `other`."""

    other: Row
    comparison: Comparison


@dataclass(frozen=True)
class KeptSummary:
    """Where the headline row's head looks: the patches that it keeps, over all questions and frames.

    Attributes:
        frequency: [rows, cols] share of frames in which each patch is kept.
        share: Share of patches kept.
        shared: Share of kept patches that two questions about one clip have in common; None if unknown.
        agreement: Agreement of the kept patches with known places of the objects asked about; None if none are known.
    """

    frequency: NDArray[np.float64]
    share: float
    shared: float | None
    agreement: Agreement | None


@dataclass(frozen=True)
class SplitPage:
    """Content of the page about one split.

    Attributes:
        name: `direct` or `indirect`.
        title: Title of the questions, as from `train.report.table.title`.
        answers: Answers of the rows, with intervals and text metrics.
        ours: Row of the headline: `train.report.analysis.headline_row`.
        gains: Gains of that row over the better blind baseline, then over the other heads.
        tags: Breakdown by reasoning tag.
        examples: Wins, losses and random questions.
        best: Highest accuracy of a row, by column.
        grid: Rows and columns of patches.
        ratios: Selection ratios at which the examples can be shown, rising.
        table_ratio: Selection ratio of the head in the table.
        kept: Summary of where the head looks; None if it recorded no selection.
        explanation: Which patches matter to its answers; None if `train explain` was not run.
        data: All questions and pairs of systems, for the page's script.
    """

    name: str
    title: str
    answers: SplitAnswers
    ours: Row
    gains: tuple[Gain, ...]
    tags: tuple[TagLine, ...]
    examples: tuple[Example, ...]
    best: Mapping[str, float]
    grid: tuple[int, int]
    ratios: tuple[str, ...]
    table_ratio: str
    kept: KeptSummary | None
    explanation: Explanation | None
    data: Mapping[str, Any] | None

    @property
    def rows(self) -> Sequence[Row]:
        """Rows of the table."""
        return self.answers.rows


def write_report(config: Config, folder: Path) -> Path:
    """Write `report.html` into `folder` from the runs and sweeps below it.

    Anything that cannot be read, such as a missing video, is reported on the page and on stderr, one line each.

    Args:
        config: Config of one of the runs, with the paths of annotations, videos and the store.
        folder: Folder of the runs, as for `train.report.table.write_table`.

    Returns:
        Path of the page.

    Raises:
        TableError: There is no readable run below `folder`.
    """
    results = gather(folder)
    found = [*results.problems]
    sweeps = _sweeps(folder, found)
    splits = [_split_page(config, results, split, sweeps, found) for split in results.splits]
    logs = _logs(results, found)
    clips = {clip_id: clip for split in splits for clip_id, clip in split.answers.questions.clips.items()}
    stores = report_integrity.store_facts(results, clips.values(), config.data.root)
    colours = _colours(splits)
    charts = _charts(splits, sweeps, logs, colours)
    explained = {split.ours.best.dir: split.explanation.questions for split in splits if split.explanation}
    problems = list(dict.fromkeys(found))
    page = _render(
        relative=lambda path: path.relative_to(folder).as_posix() if path else "–",
        title=f"Results in {folder.resolve().name}",
        notices=table.notices(results),
        splits=splits,
        titles={split.name: split.title for split in splits},
        origin=table.origin(results),
        charts=charts,
        colour=colours.__getitem__,
        sweeps=sweeps,
        stores=stores,
        recipe=repeat.recipe(results, sweeps, explained),
        versions=report_integrity.versions(results),
        problems=problems,
        comparable=any(len(split.data["systems"]) > 1 for split in splits if split.data),
        data=question_list.as_script([split.data for split in splits if split.data]),
    )
    path = folder / "report.html"
    write_whole(path, page)
    for problem in problems[:_MOST_PROBLEMS]:
        print(f"report: {problem}", file=sys.stderr)
    if len(problems) > _MOST_PROBLEMS:
        rest = counted(len(problems) - _MOST_PROBLEMS, "more problem is", "more problems are")
        print(f"report: {rest} listed in {path}", file=sys.stderr)
    return path


def _split_page(
    config: Config, results: Results, split: str, sweeps: Sequence[Sweep], problems: list[str]
) -> SplitPage:
    rows = results.split(split)
    ours, title = report_analysis.headline_row(rows), table.title(split, rows)
    try:
        config = report_analysis.config_of(ours, config)
    except SourceError as error:
        problems.append(str(error))
    grid = report_integrity.grid_of(config.store.path, config.video.size)
    answers = read_split(config, split, rows, problems)
    questions = answers.questions
    examples: list[Example] = []
    kept_summary, explanation = None, None
    if ours.label in answers.correctness:
        kept = report_analysis.kept_by_ratio(ours, sweeps, questions, problems)
        if chosen := kept.get(report_analysis.ratio_label(ours)):
            frames = report_analysis.frames_chosen_from(ours, config)
            kept_summary = _kept_summary(chosen.selection, questions, grid, frames)
        examples = report_analysis.build_examples(config, answers, ours, kept, grid)
        missing = dict.fromkeys(example.missing for example in examples if example.missing)
        problems += [f"no picture: {reason}" for reason in missing]
    try:
        explanation = read_explanation(ours.best.dir)
    except ExplanationError as error:
        problems.append(str(error))
    return SplitPage(
        name=split,
        title=title,
        answers=answers,
        ours=ours,
        gains=tuple(_gains(answers, ours)),
        tags=tuple(report_analysis.tag_lines(rows)),
        examples=tuple(examples),
        best={part: max(row.mean(part) or 0.0 for row in rows) for part in COLUMNS},
        grid=grid,
        ratios=tuple(sorted({step.label for example in examples for step in example.steps}, key=float)),
        table_ratio=report_analysis.ratio_label(ours),
        kept=kept_summary,
        explanation=explanation,
        data=_script_data(answers, ours, title),
    )


def _kept_summary(selection: Selection, questions: Questions, grid: tuple[int, int], frames: int | None) -> KeptSummary:
    """Summary of where a head looks, from its selection; `frames` as for `agreement`."""
    patches = grid[0] * grid[1]
    return KeptSummary(
        frequency=selection.frequency(patches).reshape(grid),
        share=selection.kept.shape[2] / patches,
        shared=selection.shared({q: question.clip_id for q, question in questions.by_id.items()}, patches),
        agreement=report_analysis.agreement(selection, questions, grid, frames),
    )


def _script_data(answers: SplitAnswers, ours: Row, title: str) -> dict[str, Any] | None:
    questions, correctness = answers.questions, answers.correctness
    if not questions.by_id or not correctness:
        return None
    headline = list(correctness).index(ours.label) if ours.label in correctness else 0
    found = question_list.question_list(questions, correctness)
    names = {"split": ours.split, "title": title, "headline": headline}
    return {**names, **found, "pairs": question_list.pairs(questions, correctness)}


def _gains(answers: SplitAnswers, ours: Row) -> list[Gain]:
    questions, correctness = answers.questions, answers.correctness
    if not questions.by_id or ours.label not in correctness:
        return []
    return [
        Gain(row, compare(correctness[ours.label].by_seed, correctness[row.label].by_seed, questions.clip_ids))
        for row in report_analysis.rivals(answers.rows, ours)
        if row.label in correctness
    ]


def _sweeps(folder: Path, problems: list[str]) -> list[Sweep]:
    found = []
    for path in sorted((folder / SWEEPS).glob(f"**/{SWEEP}")):
        try:
            found.append(read_sweep(path))
        except SourceError as error:
            problems.append(str(error))
    found.sort(key=lambda sweep: (sweep.split != SPLITS[0], sweep.split, sweep.name))
    return [sweep for sweep in found if sweep.runs]


def _colours(splits: Sequence[SplitPage]) -> dict[str, int]:
    """A colour for each row, by label; the headline rows get the first ones."""
    labels = dict.fromkeys([split.ours.label for split in splits])
    labels |= dict.fromkeys(row.label for split in splits for row in split.rows)
    return {label: number % COLOURS for number, label in enumerate(labels)}


def _charts(
    splits: Sequence[SplitPage],
    sweeps: Sequence[Sweep],
    logs: Mapping[str, Mapping[str, TrainingLog]],
    colours: Mapping[str, int],
) -> dict[str, list[Chart]]:
    """The charts of each section, by its name; sections without data are left out."""
    charts: dict[str, list[Chart]] = {"table": [], "ratio": [], "curves": [], "selection": [], "explanation": []}
    for split in splits:
        if any(row.mean("all") is not None for row in split.rows):
            charts["table"].append(_table_chart(split, colours))
        if curves := [sweep for sweep in sweeps if sweep.split == split.name and sweep.varies_ratio]:
            charts["ratio"].append(_ratio_chart(split, curves, colours))
        charts["curves"] += _training_charts(split, logs.get(split.name, {}), colours)
        if split.kept is not None:
            charts["selection"].append(heat_map(split.title, split.kept.frequency, split.kept.share))
        if split.explanation is not None:
            charts["explanation"] += _explanation_charts(split.title, split.explanation)
    return {name: drawn for name, drawn in charts.items() if drawn}


def _table_chart(split: SplitPage, colours: Mapping[str, int]) -> Chart:
    bars = []
    for row in split.rows:
        if (mean := row.mean("all")) is not None:
            interval = split.answers.intervals.get((row.label, "all"))
            seeds = row.values("all") if len(row.runs) > 1 else []
            ends = None if interval is None else (interval.low, interval.high)
            bars.append(Bar(row.label, colours[row.label], mean, ends, seeds))
    return bar_chart(split.title, bars, "accuracy, all test questions (%)")


def _ratio_chart(split: SplitPage, sweeps: Sequence[Sweep], colours: Mapping[str, int]) -> Chart:
    lines = []
    settings = [(sweep, setting) for sweep in sweeps for setting in sweep.settings]
    own = dict(colours)  # the first line of a system has its colour
    for number, (sweep, setting) in enumerate(settings):
        points = sweep.curve(setting)
        label = setting or (sweep.system if len(settings) == 1 else f"{sweep.system}, {sweep.name}")
        lows, highs = zip(*(point.band for point in points))
        band = None if lows == highs else (lows, highs)
        colour = own.pop(sweep.system, len(colours) + number)
        lines.append(Line(label, colour, [point.ratio for point in points], [point.mean for point in points], band))
    lines += [
        Line(row.label, colours[row.label], (), [mean], level=True)
        for row in report_analysis.rivals(split.rows, split.ours)
        if (mean := row.mean("all")) is not None
    ]
    ticks = spaced({point.ratio for sweep in sweeps for point in sweep.points})
    return line_chart(split.title, lines, "share of patches kept in each frame", "accuracy (%)", ticks)


def _training_charts(split: SplitPage, logs: Mapping[str, TrainingLog], colours: Mapping[str, int]) -> list[Chart]:
    losses = [
        Line(label, colours[label], *thin(log.steps, log.losses)) for label, log in logs.items() if len(log.steps) > 1
    ]
    vals = [Line(label, colours[label], log.epochs, log.val) for label, log in logs.items() if len(log.epochs) > 1]
    drawn = []
    if losses:
        drawn.append(line_chart(f"{split.title}: training loss", losses, "step", "training loss"))
    if vals:
        drawn.append(line_chart(f"{split.title}: accuracy on val", vals, "epoch", "accuracy, all val questions (%)"))
    return drawn


def _explanation_charts(title: str, explanation: Explanation) -> list[Chart]:
    percents = [100 * share for share in explanation.shares]
    return [
        line_chart(
            f"{title}: {kind}",
            [
                Line(ranking.name, number, percents, getattr(ranking, kind))
                for number, ranking in enumerate(explanation.rankings)
            ],
            f"patches {past}, % of each frame",
            "probability of the answer (%)",
        )
        for kind, past in (("deletion", "deleted"), ("insertion", "inserted"))
    ]


def _logs(results: Results, problems: list[str]) -> dict[str, dict[str, TrainingLog]]:
    logs: dict[str, dict[str, TrainingLog]] = {}
    for row in results.rows:
        if row.best.log is None or row.label != row.system:
            continue
        try:
            logs.setdefault(row.split, {})[row.label] = read_log(row.best.log)
        except SourceError as error:
            problems.append(str(error))
    return logs


def _render(**content: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "number": "{:.2f}".format,
        "signed": _signed,
        "coded": _coded,
        "quoted": shlex.quote,
    }
    environment.globals |= {
        "cell": table.cell,
        "text_cells": table.text_cells,
        "text_note": table.TEXTS,
        "text_names": tuple(NAMES.values()),
        "training_cells": table.training_cells,
        "question_counts": table.question_counts,
        "digest": repeat.digest,
        "blind": BLIND,
        "is_standin": table.is_standin,
        "anchor": question_list.anchor,
    }
    css, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template("report.html.j2")
    # Only these two files of the package, which contain no data, are inserted unescaped.
    return template.render(policy=policy, css=Markup(css), script=Markup(script), **content)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _coded(text: str) -> Markup:
    """Text as HTML, with `names` in backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))
