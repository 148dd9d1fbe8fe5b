"""What a folder of runs holds: every finished run below it, seeds gathered into the rows of the results table.

A run is a folder with `test.json`, `card.json` and `log.jsonl`. Members of a sweep (below a folder called `sweeps`) are
no rows of the table: they are points of the ratio plot.
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from egopatch.configs.schema import Config

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
        system: System, as in `head.name`.
        split: `direct` or `indirect`.
        seed: of the training.
        scores: test accuracy over `open`, `binary`, `all` and `split_tag` (the questions tagged with the split's name).
        tags: test accuracy over each reasoning tag.
        val: accuracy over all questions of *val* of the checkpoint kept, in percent; None where none was recorded.
        card: the model card as written.
        unseen: test questions about quarantined clips, which got the majority answer.
    """

    dir: Path
    system: str
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
        label: Name of the row: the system, with the options that distinguish it where several settings were run.
        system: the system alone, as in `head.name`.
        runs: its seeds; the first is the one best on val, whose checkpoint and log are named.
    """

    label: str
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


def table_folder(config: Config) -> Path:
    """The folder whose runs `table` and `report` gather, and into which they write: `run.table`."""
    return config.run.dir.parent if config.run.table is None else config.run.table


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
    for system, split in sorted({(run.system, run.split) for run in runs}, key=_row_key):
        members = [run for run in runs if (run.system, run.split) == (system, split)]
        rows.extend(_rows_of(system, split, members, folder, problems))
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
        system, split, seed = str(test["model"]), str(test["split"]), int(test.get("seed", card.get("seed", 0)))
        unseen = int(test.get("unseen", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"test.json is not a result ({type(error).__name__}: {error}); evaluate it again") from error
    return Run(path, system, split, seed, scores, tags, _val(card.get("val")), card, unseen)


def _run_folders(folder: Path) -> list[Path]:
    """Folders below `folder` that are runs or were going to be, but not those of a sweep."""
    found = {path.parent for name in ("test.json", "card.json", "log.jsonl") for path in folder.glob(f"**/{name}")}
    return sorted(path for path in found if "sweeps" not in path.relative_to(folder).parts)


def _rows_of(system: str, split: str, runs: list[Run], folder: Path, problems: list[str]) -> list[Row]:
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
        row = Row(system, system, split, tuple(ranked))
        if group is not groups[0]:
            options = group[0].options
            apart = {key: options.get(key) for key in options.keys() | base.keys() if options.get(key) != base.get(key)}
            row = replace(row, label=f"{system} ({', '.join(f'{k} {v}' for k, v in sorted(apart.items()))})")
            problems.append(f"{system} {split}: several settings were run, so {row.label} has a row of its own")
        rows.append(row)
    return rows


def _row_key(key: tuple[str, str]) -> tuple[int, int, str, str]:
    system, split = key
    place = ORDER.index(system) if system in ORDER else len(ORDER) - len(OURS) - 0.5
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), int(2 * place), split, system)


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
