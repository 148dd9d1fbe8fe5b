"""The results table, in the shape of the published one: `table.md` and `table.json`, with the origin of the numbers."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config, DataConfig
from egopatch.train.report.answers import SplitAnswers, read_split
from egopatch.train.rundir.names import CARD, TEST
from egopatch.train.rundir.results import (
    BLIND,
    COLUMNS,
    WITHOUT_FEATURES,
    Results,
    Row,
    card_option,
    data_title,
    gather,
)
from egopatch.train.rundir.run_folder import is_rendered, write_whole
from egopatch.train.scores.statistics import Interval
from egopatch.train.scores.text_metrics import NAMES

TEXTS = "Answers compared as lower-cased texts by sacrebleu, nltk and rouge-score; in percent, mean over seeds."


def write_table(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Write `table.md` and `table.json` into `folder` from the runs below it.

    Incomplete and damaged runs are listed below the table and on stderr, one line each.

    Args:
        config: Config of one of the runs, whose annotations the intervals need.
        folder: Folder of the runs.

    Returns:
        The rows of `table.json`: `model` (label of the row), `split`, `open`, `binary`, `all` (percent, two decimals,
        None without such questions), `n` (test questions), `checkpoint`, `log` (relative to `folder`, None if missing);
        where answers are free text, also `text`, with the metrics of `train.scores.text_metrics`.

    Raises:
        TableError: There is no readable run.
    """
    results = gather(folder)
    problems = [*results.problems]
    answers = {split: read_split(config, split, results.split(split), problems) for split in results.splits}
    results = replace(results, problems=tuple(dict.fromkeys(problems)))
    records = [record(row, folder, answers[row.split].texts.get(row.label, {})) for row in results.rows]
    write_whole(folder / "table.json", json.dumps(records, indent=2) + "\n")
    write_whole(folder / "table.md", markdown(results, answers))
    for problem in results.problems:
        print(f"table: {problem}", file=sys.stderr)
    return records


def record(row: Row, folder: Path, texts: Mapping[str, Interval]) -> dict[str, Any]:
    """One entry of `table.json`."""
    numbers = {part: None if (mean := row.mean(part)) is None else round(mean, 2) for part in COLUMNS}
    return {
        "model": row.label,
        "split": row.split,
        **numbers,
        "n": row.n("all"),
        "checkpoint": _relative(row.best.checkpoint, folder),
        "log": _relative(row.best.log, folder),
        **({"text": {name: round(found.mean, 2) for name, found in texts.items()}} if texts else {}),
    }


def markdown(results: Results, answers: Mapping[str, SplitAnswers]) -> str:
    """`table.md`: a section for each split, then the origin of the numbers."""
    lines = ["# Results", "", "Accuracy on the test questions, in percent.", ""]
    for split in results.splits:
        found = answers[split]
        rows, questions = found.rows, found.questions
        lines += [f"## {_escape(title(split, rows))}", "", question_counts(rows), ""]
        lines += ["| System | Open | Binary | All | Wrong form | Time to 95% | Checkpoint | Log |"]
        lines += ["|:--|--:|--:|--:|--:|--:|:--|:--|"]
        for row in rows:
            cells = [cell(row, part, found) for part in COLUMNS]
            links = [
                f"[{path.name}](<{_relative(path, results.folder)}>)" if path else "–"
                for path in (row.best.checkpoint, row.best.log)
            ]
            lines.append("| " + " | ".join([_escape(row.label), *cells, *training_cells(row), *links]) + " |")
        tagged = [
            f"{_escape(row.label)} {cell(row, 'split_tag', found)}" for row in rows if row.mean("split_tag") is not None
        ]
        if tagged:
            n = rows[0].n("split_tag")
            lines += ["", f"Accuracy over only the {n:,} questions tagged `{split}`: {', '.join(tagged)}."]
        if found.texts:
            lines += ["", TEXTS, "", f"| System | {' | '.join(NAMES.values())} |", "|:--|" + "--:|" * len(NAMES)]
            lines += [f"| {_escape(row.label)} | {' | '.join(text_cells(row, found))} |" for row in rows]
        # Other data sets have too many tags for a table.
        types = Counter(tag for q in questions.by_id.values() for tag in q.tags) if questions.choices else {}
        if types:
            systems = " | ".join(_escape(row.label) for row in rows)
            lines += ["", "By type of question:", "", f"| Type | n | {systems} |", "|:--|" + "--:|" * (1 + len(rows))]
        for kind, n in sorted(types.items()):
            cells = [cell(row, f"tag {kind}", found) for row in rows]
            lines.append(f"| {_escape(kind)} | {n:,} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Where these numbers come from", ""]
    lines += [f"- {line}" for line in (*notices(results), *origin(results))]
    lines += [f"- Left out, or to check: {_escape(problem)}" for problem in results.problems]
    return "\n".join(lines) + "\n"


def cell(row: Row, part: str, answers: SplitAnswers) -> str:
    """A cell of the table: the mean over seeds with two decimals, and its interval if there is one."""
    return _with_interval(row.mean(part), answers.intervals.get((row.label, part)))


def _with_interval(mean: float | None, interval: Interval | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.2f}" + ("" if interval is None else f" [{interval.low:.1f}, {interval.high:.1f}]")


def text_cells(row: Row, answers: SplitAnswers) -> list[str]:
    """The text metrics of a row's answers, in the order of `NAMES`."""
    found = answers.texts.get(row.label)
    return ["–" if found is None else _with_interval(found[name].mean, found[name]) for name in NAMES]


def training_cells(row: Row) -> tuple[str, str]:
    """The share of answers of the wrong form, and the time of training until val reached 95% of its best."""
    wrong, seconds = row.wrong_form, row.seconds_to_converge
    return "–" if wrong is None else f"{wrong:.1f}%", "–" if seconds is None else f"{seconds:.0f} s"


def title(split: str, rows: Sequence[Row]) -> str:
    """Title of the questions of `rows`: EgoTaskQA's split, or the folder of another data set."""
    name = data_title(split, [row.best.card for row in rows])
    return name.capitalize() if name == split else name


def question_counts(rows: Sequence[Row]) -> str:
    """Sentence with the number of questions of one split; if the rows differ, with each row's number."""
    counts = {tuple(row.n(part) for part in ("all", "open", "binary")): row.label for row in rows}
    texts = [f"n = {a:,} questions: {o:,} open, {b:,} binary" for a, o, b in counts]
    if len(texts) == 1:
        return texts[0] + "."
    return "Rows count different questions: " + "; ".join(
        f"{label} {text}" for label, text in zip(counts.values(), texts)
    )


def notices(results: Results) -> list[str]:
    """Warnings that belong beside the numbers, from the model cards: random stand-in weights, synthetic data."""
    cards = [run.card for row in results.rows for run in row.runs]
    found = []
    reading = [r for r in results.rows if r.head not in WITHOUT_FEATURES]
    random = dict.fromkeys(r.label for r in reading if is_standin(r.best.card))
    if random:
        found.append(
            f"The encoder weights of {', '.join(random)} are random stand-ins, not the published ones: these numbers "
            "show that the pipeline runs end to end; they say nothing about the accuracy of the published network."
        )
    lite = dict.fromkeys(r.label for r in reading if card_option(r.best.card, "encoder", "arch") == "lite")
    if lite:
        names = ", ".join(lite)
        found.append(
            f"The encoder weights of {names} are pretrained ones (ImageNet, MiniLM), not trained on this data set."
        )
    found += filter(None, (_several_data_sets(split, results.split(split)) for split in results.splits))
    if any(is_synthetic(card) for card in cards):
        found.append(
            "The videos and questions are synthetic (EgoSynth), so results are not comparable with EgoTaskQA's."
        )
    return found


def _several_data_sets(split: str, rows: Sequence[Row]) -> str | None:
    """A warning if the rows of one split are about questions of several folders or files; None if not."""
    rows_of: dict[str, list[str]] = {}
    for row in rows:
        root, questions = (card_option(row.best.card, "data", name) for name in ("root", "questions"))
        if root:
            own = questions and questions != DataConfig.questions
            rows_of.setdefault(f"{root}/{questions}" if own else str(root), []).append(row.label)
    if len(rows_of) < 2:
        return None
    each = "; ".join(f"{', '.join(labels)}: {data}" for data, labels in rows_of.items())
    return f"Rows of {title(split, rows)} come from several data sets and cannot be compared with each other: {each}."


def is_standin(card: Mapping[str, Any]) -> bool:
    """Whether a card describes an encoder with random weights."""
    checkpoint = Path(str(card_option(card, "encoder", "checkpoint"))).name.lower()
    return _stated(card, "stand-in", "standin", "random weight", "random-weight") or "random" in checkpoint


def is_synthetic(card: Mapping[str, Any]) -> bool:
    """Whether a card describes rendered data."""
    if (recorded := card.get("synthetic")) is not None:
        return bool(recorded)
    # An earlier version's card has only the path, which may not exist on this machine.
    root = str(card_option(card, "data", "root"))
    return _stated(card, "synthetic", "egosynth") or (bool(root) and is_rendered(Path(root)))


def origin(results: Results) -> list[str]:
    """The origin of the numbers, one statement per item."""
    seeds = sorted({len(row.runs) for row in results.rows})
    mean = "one seed per row" if seeds == [1] else f"mean over {_span(seeds)} seeds per row"
    alone = "; for a row of one seed, they leave out the spread between seeds" if 1 in seeds else ""
    count = max(run.quarantined for row in results.rows for run in row.runs)
    about = "test question is" if count == 1 else "test questions are"
    quarantined = f"Up to {count:,} {about} about quarantined clips, for which the majority answer stands in."
    return [
        f"{mean[0].upper()}{mean[1:]}; checkpoint and log are from the seed that is best on val. "
        "Nothing is chosen on test.",
        f"In brackets: 95% intervals over seeds and clips (`train.scores.statistics`){alone}.",
        "Wrong form: share of answers that do not fit the question, such as `cup` to a yes/no question. Time to 95%: "
        "training time until val first reached 95% of its best, median over seeds.",
        f"Each row is the mean over `{TEST}` of its runs; `{CARD}` beside it has the command and versions.",
        f"`{'`, `'.join(BLIND[:-1])}` and `{BLIND[-1]}` never see the video. All other systems read cached features of "
        "uniformly sampled frames.",
        *([quarantined] if count else []),
    ]


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _stated(card: Mapping[str, Any], *words: str) -> bool:
    """Whether one of `words` occurs in the card's notice, fingerprints, or data and encoder options."""
    config = card.get("config") or {}
    places = [card.get(key) for key in ("notice", "notices", "fingerprint", "text_fingerprint")]
    places += [config.get(section) for section in ("data", "encoder")]
    text = " ".join(json.dumps(place, default=str).lower() for place in places if place)
    return any(word in text for word in words)


def _relative(path: Path | None, folder: Path) -> str | None:
    return None if path is None else path.relative_to(folder).as_posix()


def _escape(text: str) -> str:
    """Escape what would end a table cell or start markup."""
    return text.replace("|", "\\|").replace("<", "&lt;")
