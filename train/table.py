"""The results table: every run below a folder, seeds averaged, in the published shape.

A run is a folder with `test.json`, `card.json` and `log.jsonl`. Members of a sweep (below a folder called `sweeps`) are
no rows of the table: they are points of the ratio plot.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

BLIND = ("majority", "question-only")
PUBLISHED = ("egovlp", "egovlpv2", "mfas")
OURS = ("psa",)
ORDER = (*BLIND, *PUBLISHED, *OURS)
SPLITS: tuple[Literal["direct", "indirect"], ...] = ("direct", "indirect")
COLUMNS = ("open", "binary", "all")

# Options that change where or how fast a run goes, never what it measures: runs that differ in these alone are seeds
# of one another.
_INCIDENTAL = {
    "run.dir", "run.table", "train.seed", "train.device", "train.residency", "encoder.device", "encoder.batch",
    "head.implementation", "store.path", "store.format", "store.shard", "video.timeout_s", "video.memory_gb",
}  # fmt: skip


class TableError(ValueError):
    """The folder holds no results; the message says which command makes them."""


@dataclass(frozen=True)
class Score:
    """Accuracy in percent over `n` questions; None where there are no such questions."""

    accuracy: float | None
    n: int


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        dir: its folder.
        model: system, as in `head.name`.
        split: `direct` or `indirect`.
        seed: of the training.
        scores: test accuracy over `open`, `binary`, `all` and `split_tag` (the questions tagged with the split's name).
        tags: test accuracy over each reasoning tag.
        val: accuracy over all questions of *val* of the checkpoint kept, in percent; None where none was recorded.
        card: the model card as written.
        unseen: test questions about quarantined clips, which got the majority answer.
    """

    dir: Path
    model: str
    split: str
    seed: int
    scores: Mapping[str, Score]
    tags: Mapping[str, Score]
    val: float | None
    card: Mapping[str, Any]
    unseen: int = 0

    @property
    def checkpoint(self) -> Path | None:
        """What `evaluate` loads: the weights, or the card alone for a system without any."""
        return next((self.dir / name for name in ("best.safetensors", "card.json") if (self.dir / name).exists()), None)

    @property
    def log(self) -> Path | None:
        """The training log, if there is one."""
        path = self.dir / "log.jsonl"
        return path if path.exists() else None

    @property
    def options(self) -> dict[str, Any]:
        """The resolved config as `section.field: value`, without what cannot change a result."""
        config = self.card.get("config") or {}
        return {
            f"{section}.{name}": value
            for section, fields in sorted(config.items())
            if isinstance(fields, Mapping) and section != "engine"
            for name, value in sorted(fields.items())
            if f"{section}.{name}" not in _INCIDENTAL
        }


@dataclass(frozen=True)
class Row:
    """One row of the table: the mean over the seeds of one system on one split.

    Attributes:
        model: label of the row: the system, with the options that set it apart where several settings were run.
        system: the system alone, as in `head.name`.
        runs: its seeds; the first is the one best on val, whose checkpoint and log are named.
    """

    model: str
    system: str
    split: str
    runs: tuple[Run, ...]

    @property
    def best(self) -> Run:
        """The seed best on val (the lowest seed where val does not tell)."""
        return self.runs[0]

    def mean(self, part: str) -> float | None:
        """Mean accuracy over seeds, percent, of `open`, `binary`, `all` or `split_tag`."""
        values = self.values(part)
        return statistics.fmean(values) if values else None

    def sd(self, part: str) -> float | None:
        """Sample standard deviation over seeds, in points; None for a single seed."""
        values = self.values(part)
        return statistics.stdev(values) if len(values) > 1 else None

    def values(self, part: str) -> list[float]:
        """Accuracy of each seed that has one."""
        scores = [run.scores[part].accuracy for run in self.runs if part in run.scores]
        return [value for value in scores if value is not None]

    def n(self, part: str) -> int:
        """Questions that the accuracy is over."""
        score = self.best.scores.get(part)
        return score.n if score else 0


@dataclass(frozen=True)
class Results:
    """What a folder of runs holds: rows in the order of the table, and one line for each thing that is wrong."""

    folder: Path
    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    def split(self, split: str) -> tuple[Row, ...]:
        """Rows of one split."""
        return tuple(row for row in self.rows if row.split == split)

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that have rows, direct first."""
        return tuple(dict.fromkeys(row.split for row in self.rows))


def gather(folder: Path) -> Results:
    """Read every run below `folder`.

    Raises:
        TableError: there is no readable run; the message names the command that makes one.
    """
    problems: list[str] = []
    runs: list[Run] = []
    for path in _run_folders(folder):
        try:
            runs.append(read_run(path))
        except (OSError, ValueError) as error:
            problems.append(f"{path.relative_to(folder)}: {error}")
    if not runs:
        raise TableError(
            f"{folder} holds no finished run ({'; '.join(problems) or 'no test.json in it'}); "
            "train one first: python -m train fit --config CONFIG"
        )
    rows: list[Row] = []
    for model, split in sorted({(run.model, run.split) for run in runs}, key=_row_key):
        members = [run for run in runs if (run.model, run.split) == (model, split)]
        rows.extend(_rows_of(model, split, members, folder, problems))
    return Results(folder, tuple(rows), tuple(problems))


def read_run(path: Path) -> Run:
    """Read one run's `test.json` and `card.json`.

    Raises:
        ValueError: a file is missing or damaged; one line says which and what to do.
    """
    if not (path / "test.json").exists():
        raise ValueError("not evaluated (no test.json); run python -m train evaluate on its config")
    test = _read_object(path / "test.json")
    card = _read_object(path / "card.json")
    try:
        scores = {part: _score(test[part]) for part in COLUMNS}
        if test.get("split_tag") is not None:
            scores["split_tag"] = _score(test["split_tag"])
        tags = {str(tag): _score(value) for tag, value in (test.get("tags") or {}).items()}
        model, split, seed = str(test["model"]), str(test["split"]), int(test.get("seed", card.get("seed", 0)))
        unseen = int(test.get("unseen", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"test.json is not a result ({type(error).__name__}: {error}); evaluate it again") from error
    return Run(path, model, split, seed, scores, tags, _val(card.get("val")), card, unseen)


def write_table(folder: Path) -> list[dict[str, Any]]:
    """Write `table.md` and `table.json` into `folder` from the runs below it.

    Incomplete and damaged runs are listed under the table and on stderr, one line each.

    Returns:
        The rows as in `table.json`: `model`, `split`, `open`, `binary`, `all` (percent, two decimals, None without
        such questions), `n` (test questions), `checkpoint`, `log` (paths relative to `folder`, None without the file).

    Raises:
        TableError: there is no readable run.
    """
    results = gather(folder)
    records = [record(row, folder) for row in results.rows]
    (folder / "table.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    for problem in results.problems:
        print(f"table: {problem}", file=sys.stderr)
    return records


def record(row: Row, folder: Path) -> dict[str, Any]:
    """One entry of `table.json`."""
    numbers = {part: None if (mean := row.mean(part)) is None else round(mean, 2) for part in COLUMNS}
    return {
        "model": row.model,
        "split": row.split,
        **numbers,
        "n": row.n("all"),
        "checkpoint": _relative(row.best.checkpoint, folder),
        "log": _relative(row.best.log, folder),
    }


def markdown(results: Results) -> str:
    """`table.md`: a section for each split, then where the numbers come from and what they are not."""
    lines = ["# Results", "", "Accuracy on the test questions, in percent.", ""]
    for split in results.splits:
        rows = results.split(split)
        lines += [f"## {split.capitalize()}", "", question_counts(rows), ""]
        lines += ["| Model | Open | Binary | All | Checkpoint | Log |", "|:--|--:|--:|--:|:--|:--|"]
        for row in rows:
            cells = [cell(row, part) for part in COLUMNS]
            links = [
                f"[{path.name}](<{_relative(path, results.folder)}>)" if path else "–"
                for path in (row.best.checkpoint, row.best.log)
            ]
            lines.append("| " + " | ".join([_escape(row.model), *cells, *links]) + " |")
        tagged = [f"{_escape(row.model)} {cell(row, 'split_tag')}" for row in rows if row.mean("split_tag") is not None]
        if tagged:
            n = rows[0].n("split_tag")
            lines += ["", f"All over the {n:,} questions tagged `{split}` alone: {', '.join(tagged)}."]
        lines.append("")
    lines += ["## Where these numbers come from", ""]
    lines += [f"- {line}" for line in (*notices(results), *origin(results))]
    lines += [f"- Left out or worth a look: {_escape(problem)}" for problem in results.problems]
    return "\n".join(lines) + "\n"


def cell(row: Row, part: str) -> str:
    """A number of the table: the mean with two decimals, and the spread where there are several seeds."""
    mean, sd = row.mean(part), row.sd(part)
    if mean is None:
        return "–"
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def question_counts(rows: Sequence[Row]) -> str:
    """How many questions the numbers of one split are over; says so where the rows disagree."""
    counts = {tuple(row.n(part) for part in ("all", "open", "binary")): row.model for row in rows}
    texts = [f"n = {a:,} questions: {o:,} open, {b:,} binary" for a, o, b in counts]
    if len(texts) == 1:
        return texts[0] + "."
    return "Rows are over different questions: " + "; ".join(
        f"{model} {text}" for model, text in zip(counts.values(), texts)
    )


def notices(results: Results) -> list[str]:
    """What must be said beside the numbers: random stand-in weights, a synthetic set. Taken from the model cards."""
    cards = [run.card for row in results.rows for run in row.runs]
    found = []
    if any(is_standin(card) for card in cards):
        found.append(
            "The encoder's weights are random stand-ins, not the published ones: "
            "the numbers show that the pipeline works, not how good the published network is."
        )
    if any(is_synthetic(card) for card in cards):
        found.append("The videos and questions are synthetic (EgoSynth): not comparable with EgoTaskQA results.")
    return found


def is_standin(card: Mapping[str, Any]) -> bool:
    """Whether a card says that the encoder's weights are random."""
    checkpoint = Path(str(_option(card, "encoder", "checkpoint"))).name.lower()
    return _stated(card, "stand-in", "standin", "random weight", "random-weight") or "random" in checkpoint


def is_synthetic(card: Mapping[str, Any]) -> bool:
    """Whether a card says that the data were rendered."""
    root = str(_option(card, "data", "root"))
    # The renderer leaves its event log beside the annotations; no recorded data set has one.
    return _stated(card, "synthetic", "egosynth") or (bool(root) and (Path(root) / "events.jsonl").exists())


def origin(results: Results) -> list[str]:
    """How the numbers were made, one statement an item."""
    seeds = sorted({len(row.runs) for row in results.rows})
    spread = "one seed a row" if seeds == [1] else f"mean ± standard deviation over {_span(seeds)} seeds a row"
    unseen = max(run.unseen for row in results.rows for run in row.runs)
    quarantined = f"Up to {unseen:,} test questions are about quarantined clips; they got the majority answer, unseen."
    return [
        f"{spread[0].upper()}{spread[1:]}; checkpoint and log are those of the seed best on val; "
        "nothing is chosen on test.",
        "Each row is the mean of `test.json` in the run folders; the run's `card.json` has its command and versions.",
        "`majority` and `question-only` never see the video. The other systems read the same cached features "
        "of uniformly sampled frames.",
        *([quarantined] if unseen else []),
    ]


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _option(card: Mapping[str, Any], section: str, name: str) -> object:
    return ((card.get("config") or {}).get(section) or {}).get(name, "")


def _stated(card: Mapping[str, Any], *words: str) -> bool:
    """Whether the card's notice, fingerprints or data and encoder options have one of `words`."""
    config = card.get("config") or {}
    places = [card.get(key) for key in ("notice", "notices", "fingerprint", "text_fingerprint")]
    places += [config.get(section) for section in ("data", "encoder")]
    text = " ".join(json.dumps(place, default=str).lower() for place in places if place)
    return any(word in text for word in words)


def _run_folders(folder: Path) -> list[Path]:
    """Folders below `folder` that are runs or were going to be, but not those of a sweep."""
    found = {path.parent for name in ("test.json", "card.json", "log.jsonl") for path in folder.glob(f"**/{name}")}
    return sorted(path for path in found if "sweeps" not in path.relative_to(folder).parts)


def _rows_of(model: str, split: str, runs: list[Run], folder: Path, problems: list[str]) -> list[Row]:
    """Group the runs of one system on one split into seeds of one setting; unlike settings get rows of their own."""
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(json.dumps(run.options, sort_keys=True, default=str), []).append(run)
    groups = sorted(settings.values(), key=lambda group: (-len(group), str(group[0].dir)))
    base = groups[0][0].options
    rows = []
    for group in groups:
        seeds: dict[int, Run] = {}
        for run in group:
            first = seeds.setdefault(run.seed, run)
            if first is not run:
                names = run.dir.relative_to(folder), first.dir.relative_to(folder)
                problems.append(f"{names[0]}: repeats seed {run.seed} of {names[1]} with the same config; not counted")
        ranked = sorted(seeds.values(), key=lambda run: (-(run.val if run.val is not None else -math.inf), run.seed))
        row = Row(model, model, split, tuple(ranked))
        if group is not groups[0]:
            options = group[0].options
            apart = {key: options.get(key) for key in options.keys() | base.keys() if options.get(key) != base.get(key)}
            row = replace(row, model=f"{model} ({', '.join(f'{k} {v}' for k, v in sorted(apart.items()))})")
            problems.append(f"{model} {split}: several settings were run, so {row.model} has a row of its own")
        rows.append(row)
    return rows


def _row_key(key: tuple[str, str]) -> tuple[int, int, str, str]:
    model, split = key
    place = ORDER.index(model) if model in ORDER else len(ORDER) - len(OURS) - 0.5
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), int(2 * place), split, model)


def _score(value: Mapping[str, Any]) -> Score:
    accuracy, n = value["accuracy"], int(value["n"])
    if accuracy is None or n == 0:
        return Score(None, n)
    if not 0 <= float(accuracy) <= 100:
        raise ValueError(f"accuracy is {accuracy!r}; expected a percentage")
    return Score(float(accuracy), n)


def _val(val: object) -> float | None:
    value = val.get("all") if isinstance(val, Mapping) else val
    value = value.get("accuracy") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.name} is missing; train it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is damaged ({error}); evaluate it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, expected an object; evaluate it again")
    return value


def _relative(path: Path | None, folder: Path) -> str | None:
    return None if path is None else path.relative_to(folder).as_posix()


def _escape(text: str) -> str:
    """Keep text from ending a table cell or starting markup."""
    return text.replace("|", "\\|").replace("<", "&lt;")
