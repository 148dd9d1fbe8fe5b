"""The report: one self-contained HTML page about a folder of runs.

The page loads nothing from outside and trusts no data: text is escaped, pictures are data URIs, and the
Content-Security-Policy allows only the page's own style and script, by their hashes.
"""

import base64
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip
from egopatch.features.common.units import format_bytes
from egopatch.train.report import analysis as report_analysis
from egopatch.train.report import answers as report_answers
from egopatch.train.report import integrity as report_integrity
from egopatch.train.report import plots, table
from egopatch.train.report.agreement import Agreement, agreement
from egopatch.train.report.analysis import TagLine
from egopatch.train.report.answers import Correctness, Questions
from egopatch.train.report.examples import Example
from egopatch.train.report.sources import SourceError, Sweep, TrainingLog, read_log, read_selection, read_sweep
from egopatch.train.rundir.card import write_whole
from egopatch.train.rundir.results import COLUMNS, PUBLISHED, SPLITS, Results, Row, gather
from egopatch.train.scores.statistics import Comparison, Interval

TEMPLATES = Path(__file__).parent / "templates"
_OURS = "psa"
_MOST_PROBLEMS = 20
_SHOWN_PIXELS_PER_INCH = 115


@dataclass(frozen=True)
class Plot:
    """A plot as a data URI, with the width that shows its text as large as in the other plots."""

    uri: str
    width: int


@dataclass(frozen=True)
class Gain:
    """How far our head is above the row labelled `other`."""

    other: str
    comparison: Comparison


@dataclass(frozen=True)
class SplitPage:
    """Content of the page about one split.

    Attributes:
        name: `direct` or `indirect`.
        title: What the questions are called, as in `train.report.table.title`.
        rows: Rows of the table.
        counts: Sentence on the number of questions.
        ours: Row of our head; None if it was not run.
        gains: Gains of our head over the better blind baseline, then over the published systems.
        tags: Breakdown by reasoning tag.
        examples: Wins, losses and random questions.
        intervals: Interval of each accuracy, by label and column; a row whose predictions cannot be read has none.
        best: Highest accuracy of a row, by column.
        grid: Rows and columns of patches.
        ratios: Selection ratios at which the examples can be shown, rising.
        table_ratio: Selection ratio of the head in the table.
        shared: Share of kept patches that two questions about one clip have in common; None if unknown.
        kept_share: Share of patches kept.
        agreement: Agreement of the kept patches with known places of the objects asked about; None if none are known.
        clips: Clips of the annotations; none if these cannot be read.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    counts: str
    ours: Row | None
    gains: tuple[Gain, ...]
    tags: tuple[TagLine, ...]
    examples: tuple[Example, ...]
    intervals: Mapping[str, Mapping[str, Interval]]
    best: Mapping[str, float]
    grid: tuple[int, int]
    ratios: tuple[str, ...]
    table_ratio: str
    shared: float | None
    kept_share: float
    agreement: Agreement | None
    clips: Mapping[str, Clip]


def write_report(config: Config, folder: Path) -> Path:
    """Write `report.html` and its plots (PNG) into `folder` from the runs and sweeps below it.

    What cannot be read, such as a missing video, is reported in its place on the page and on stderr, one line each.

    Args:
        config: Config of one of the runs, with the paths of annotations, videos and the store.
        folder: Folder of the runs, as for `train.report.table.write_table`.

    Returns:
        Path of the page.

    Raises:
        TableError: there is no readable run below `folder`.
    """
    results = gather(folder)
    problems = list(results.problems)
    sweeps = _sweeps(folder, problems)
    grid = report_integrity.grid_of([config.store.path], config.video.size)
    splits = [_split_page(config, results, split, sweeps, grid, problems) for split in results.splits]
    clips = {clip_id: clip for split in splits for clip_id, clip in split.clips.items()}
    stores = report_integrity.store_facts(results, clips.values(), config.data.root)
    figures = _figures(folder, results, sweeps, grid, problems)
    problems = list(dict.fromkeys(problems))
    page = _render(
        relative=lambda path: path.relative_to(folder).as_posix() if path else "–",
        title=f"Results in {folder.resolve().name}",
        notices=table.notices(results),
        splits=splits,
        origin=table.origin(results),
        figures=figures,
        sweeps=sweeps,
        stores=stores,
        versions=report_integrity.versions(results),
        problems=problems,
    )
    path = folder / "report.html"
    write_whole(path, page)
    for problem in problems[:_MOST_PROBLEMS]:
        print(f"report: {problem}", file=sys.stderr)
    if len(problems) > _MOST_PROBLEMS:
        print(f"report: {len(problems) - _MOST_PROBLEMS} more are listed in {path}", file=sys.stderr)
    return path


def _split_page(
    config: Config,
    results: Results,
    split: str,
    sweeps: Sequence[Sweep],
    grid: tuple[int, int],
    problems: list[str],
) -> SplitPage:
    rows = results.split(split)
    # Rows of other settings have longer labels; the row labelled just `psa` is the system of the table.
    ours = next((row for row in rows if row.label == _OURS), None)
    questions, right = report_answers.rows_correctness(config, split, rows, problems)
    examples: list[Example] = []
    shared, kept_share, patches, agreed = None, 0.0, grid[0] * grid[1], None
    if ours is not None and questions is not None and (correct := right.get(ours.label)) is not None:
        kept, faults = report_analysis.selections_by_ratio(ours, sweeps, questions)
        problems.extend(faults)
        if chosen := kept.get(report_analysis.ratio_label(ours)):
            kept_share = chosen[0].kept.shape[2] / patches
            agreed = agreement(chosen[0], questions, grid)
            shared = chosen[0].shared({q: question.clip_id for q, question in questions.by_id.items()}, patches)
        others = [(row, right[row.label]) for row in rows if row is not ours and row.label in right]
        examples = report_analysis.build_examples(config, questions, (ours, correct), others, kept, grid)
        missing = dict.fromkeys(example.missing for example in examples if example.missing)
        problems.extend(f"no picture: {reason}" for reason in missing)
    return SplitPage(
        split,
        table.title(split, rows),
        rows,
        table.question_counts(rows),
        ours,
        tuple(_gains(rows, ours, right, questions)),
        tuple(report_analysis.tag_lines(rows)),
        tuple(examples),
        {label: report_answers.intervals(correct, questions) for label, correct in right.items()} if questions else {},
        {part: max((row.mean(part) or 0.0 for row in rows), default=0.0) for part in COLUMNS},
        grid,
        tuple(sorted({step.label for example in examples for step in example.steps}, key=float)),
        report_analysis.ratio_label(ours) if ours else "",
        shared,
        kept_share,
        agreed,
        {} if questions is None else questions.clips,
    )


def _gains(
    rows: Sequence[Row], ours: Row | None, right: Mapping[str, Correctness], questions: Questions | None
) -> list[Gain]:
    if ours is None or questions is None or ours.label not in right:
        return []
    blind = report_analysis.best_blind_row(rows)
    others = [row for row in rows if row is blind or (row.system in PUBLISHED and row.label == row.system)]
    return [
        Gain(row.label, report_answers.difference(right[ours.label], right[row.label], questions))
        for row in others
        if row.label in right
    ]


def _sweeps(folder: Path, problems: list[str]) -> list[Sweep]:
    found = []
    for path in sorted((folder / "sweeps").glob("**/sweep.json")):
        try:
            found.append(read_sweep(path))
        except SourceError as error:
            problems.append(str(error))
    found.sort(key=lambda sweep: (sweep.split != SPLITS[0], sweep.split, sweep.name))
    return [sweep for sweep in found if sweep.runs]


def _figures(
    folder: Path, results: Results, sweeps: Sequence[Sweep], grid: tuple[int, int], problems: list[str]
) -> dict[str, Plot]:
    """Draw every plot that has data, write it into `folder` as NAME.png, and return the plots by name."""
    drawn: dict[str, Figure] = {"table": plots.draw_table(results)}
    if curves := [sweep for sweep in sweeps if sweep.varies_ratio]:
        drawn["ratio"] = plots.draw_ratio(curves, {split: _references(results, split) for split in results.splits})
    if logs := _logs(results, problems):
        drawn["curves"] = plots.draw_curves(logs)
    maps, shares = {}, {}
    for row in results.rows:
        if row.label != _OURS:
            continue
        try:
            selection = read_selection(row.best.dir / "selection.npz")
        except SourceError as error:
            problems.append(str(error))
            continue
        patches = grid[0] * grid[1]
        maps[row.split] = selection.frequency(patches).reshape(grid)
        shares[row.split] = selection.kept.shape[2] / patches
    if maps:
        drawn["selection"] = plots.draw_selection(maps, shares)
    return {
        name: Plot(
            _data_uri(plots.save(figure, folder / f"{name}.png")),
            round(figure.get_size_inches()[0] * _SHOWN_PIXELS_PER_INCH),
        )
        for name, figure in drawn.items()
    }


def _references(results: Results, split: str) -> dict[str, float]:
    """Level lines of the ratio plot: accuracy of the better blind baseline and of the published systems."""
    rows = results.split(split)
    blind = report_analysis.best_blind_row(rows)
    shown = [row for row in rows if row is blind or (row.system in PUBLISHED and row.label == row.system)]
    return {row.label: mean for row in shown if (mean := row.mean("all")) is not None}


def _logs(results: Results, problems: list[str]) -> dict[str, dict[str, TrainingLog]]:
    logs: dict[str, dict[str, TrainingLog]] = {}
    for row in results.rows:
        if row.best.log is None or row.label != row.system:
            continue
        try:
            log = read_log(row.best.log)
        except SourceError as error:
            problems.append(str(error))
            continue
        if len(log.steps) > 1 or len(log.epochs) > 1:
            logs.setdefault(row.split, {})[row.label] = log
    return logs


def _render(**content: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "number": "{:.2f}".format, "signed": _signed, "coded": _coded}
    environment.globals |= {
        "cell": table.cell,
        "training_cells": table.training_cells,
        "colour": lambda system: plots.style(system)[0],
    }
    css, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template("report.html.j2")
    # Only these two files of the package, which are no data, are inserted unescaped.
    return template.render(policy=policy, css=Markup(css), script=Markup(script), **content)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _coded(text: str) -> Markup:
    """Text as HTML, with `names` in backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))
