"""Reads the finished runs below a folder, and gathers the seeds of one setting into one row of the results table.

A run is a folder with `test.json`, `card.json` and `log.jsonl`. Runs of a sweep (below a folder called `sweeps`) are
points of the ratio plot, not rows of the table.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from egopatch.configs.schema import Config, own_title
from egopatch.train.rundir.checked_json import read_object, require_card_fields
from egopatch.train.rundir.names import CARD, LOG, QUESTIONS, SWEEPS, TEST, WEIGHTS
from egopatch.train.scores.metrics import Score

WITHOUT_FEATURES = ("majority", "longest-option")  # heads that read neither video nor text
BLIND = (*WITHOUT_FEATURES, "question-only")
PUBLISHED = ("egovlp", "egovlpv2", "mfas")
OURS = ("psa",)
ORDER = (*BLIND, *PUBLISHED, *OURS)
SPLITS: tuple[Literal["direct", "indirect"], ...] = ("direct", "indirect")
COLUMNS = ("open", "binary", "all")

# Remedy for a finished run with a missing or damaged file: `train fit` alone would only evaluate it again.
START_AGAIN = "delete the folder and train again"
# Options in which the seeds of one setting may differ: the seed, and options that change only where or how fast a run
# is computed. `run_folder.py` has a shorter list of options that a resumed run may change; the seed is not one of them.
_DIFFER_BETWEEN_SEEDS = {
    "run.dir", "run.table", "run.tracker", "train.seed", "train.device", "train.residency", "head.implementation",
    "encoder.device", "encoder.batch", "store.path", "store.format", "store.shard", "video.timeout_s",
    "video.memory_gb",
}  # fmt: skip


class TableError(ValueError):
    """The folder holds no results; the message names the command that writes some."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        dir: Folder of the run.
        system: System, as from `train.fitting.run.system_name`.
        split: `direct` or `indirect`.
        seed: Seed of the training.
        scores: Test accuracy over `open`, `binary`, `all`, `split_tag` (the questions tagged with the split's name),
            and `tag X` for each reasoning tag X.
        val: Accuracy of the kept checkpoint over all questions of *val*, in percent; None if not recorded.
        card: The model card as written.
        quarantined: Number of test questions about quarantined clips, which got the majority answer.
        wrong_form: Number of test questions with an answer of the wrong form; None if an earlier version scored it.
        seconds_to_converge: Seconds of training until val first reached 95% of its best; None if not logged.
        questions: Number and digest of the answers and questions that it learned from, by kind; empty if not recorded.
    """

    dir: Path
    system: str
    split: str
    seed: int
    scores: Mapping[str, Score]
    val: float | None
    card: Mapping[str, Any]
    quarantined: int
    wrong_form: int | None
    seconds_to_converge: float | None
    questions: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path | None:
        """File that `evaluate` loads: the weights, or the card for a system without weights."""
        return next((self.dir / name for name in (WEIGHTS, CARD) if (self.dir / name).exists()), None)

    @property
    def log(self) -> Path | None:
        """The training log; None if missing."""
        path = self.dir / LOG
        return path if path.exists() else None

    @property
    def head(self) -> str:
        """The value of `head.name`: the system without its encoder."""
        return str(card_option(self.card, "head", "name") or self.system.partition(" (")[0])

    @property
    def options(self) -> dict[str, Any]:
        """The resolved config as `section.field: value`, without nulls and options in which seeds may differ.

        Entries `trained_on.field` describe the data that the head was trained on, if it was evaluated on other data.
        `video.decoder` is `pyav` for decord too: both decode the same frames and share a fingerprint.
        """
        config = {**(self.card.get("config") or {}), "trained_on": self.card.get("trained_on")}
        options = {
            name: value
            for section, fields in sorted(config.items())
            if isinstance(fields, Mapping) and section != "engine"
            for name, value in _entries(section, fields)
            # Cards of earlier versions lack the options that were added since, whose default is null.
            if name not in _DIFFER_BETWEEN_SEEDS and value is not None
        }
        if options.get("video.decoder") == "decord":
            options["video.decoder"] = "pyav"
        return options

    @property
    def features(self) -> dict[str, Any]:
        """The fingerprints of the features that the head was trained on: stores of one config may differ."""
        return {
            f"{kind}.{name}": value
            for kind in ("fingerprint", "text_fingerprint")
            for name, value in (self.card.get(kind) or {}).items()
        }


@dataclass(frozen=True)
class Row:
    """One row of the table: the mean over the seeds of one system on one split.

    Attributes:
        label: Name of the row: the system, with the options that distinguish it where several settings were run.
        system: System, as from `train.fitting.run.system_name`.
        runs: One run per seed, best on val first; the table links to the checkpoint and log of the first.
    """

    label: str
    system: str
    split: str
    runs: tuple[Run, ...]

    @property
    def head(self) -> str:
        """The value of `head.name`: the system without its encoder."""
        return self.best.head

    @property
    def best(self) -> Run:
        """The run best on val (the lowest seed if val does not decide)."""
        return self.runs[0]

    def mean(self, part: str) -> float | None:
        """Mean accuracy over seeds, percent, of a part: `open`, `binary`, `all`, `split_tag` or `tag X`."""
        values = self.values(part)
        return statistics.fmean(values) if values else None

    def values(self, part: str) -> list[float]:
        """Accuracy of each run that has one."""
        scores = [run.scores[part].accuracy for run in self.runs if part in run.scores]
        return [value for value in scores if value is not None]

    @property
    def wrong_form(self) -> float | None:
        """Percentage of test questions with an answer of the wrong form, mean over seeds; None if not counted."""
        counts = [run.wrong_form for run in self.runs if run.wrong_form is not None]
        return 100 * statistics.fmean(counts) / self.n("all") if counts and self.n("all") else None

    @property
    def seconds_to_converge(self) -> float | None:
        """Median over seeds of the seconds of training until val first reached 95% of its best."""
        seconds = [run.seconds_to_converge for run in self.runs if run.seconds_to_converge is not None]
        return statistics.median(seconds) if seconds else None

    def n(self, part: str) -> int:
        """Number of questions in the accuracy."""
        score = self.best.scores.get(part)
        return score.n if score else 0


@dataclass(frozen=True)
class Results:
    """Rows of a folder of runs, in the order of the table, and one line for each problem."""

    folder: Path
    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    def split(self, split: str) -> tuple[Row, ...]:
        """Rows of one split."""
        return tuple(row for row in self.rows if row.split == split)

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits with rows, direct first."""
        return tuple(dict.fromkeys(row.split for row in self.rows))


def value_text(value: object) -> str:
    """An option's value as people read it, such as `question + prior`."""
    return " + ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def table_folder(config: Config) -> Path:
    """The folder whose runs `table` and `report` gather, and into which they write: `run.table`."""
    return config.run.dir.parent if config.run.table is None else config.run.table


def gather(folder: Path) -> Results:
    """Read every run below `folder`.

    Raises:
        TableError: There is no readable run; the message names the command that trains one.
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
            f"{folder} holds no finished run ({'; '.join(problems) or f'no {TEST}'}); "
            "train one first, with a run.dir below it: egopatch train fit --config CONFIG"
        )
    rows: list[Row] = []
    head_of = {(run.system, run.split): run.head for run in runs}
    for system, split in sorted(head_of, key=lambda key: _row_key(head_of[key], *key)):
        selected = [run for run in runs if (run.system, run.split) == (system, split)]
        rows.extend(_rows_of(system, split, selected, folder, problems))
    return Results(folder, tuple(rows), tuple(problems))


def read_run(path: Path) -> Run:
    """Read one run's `test.json` and `card.json`.

    Raises:
        ValueError: A file is missing or damaged; the message names it and what to do.
    """
    if not (path / TEST).exists():
        if (path / CARD).exists():
            raise ValueError(f"not evaluated (no {TEST}); run `egopatch train evaluate` with its config")
        raise ValueError(f"not trained to its end (no {CARD}); unless it is training, run `egopatch train fit` again")
    # `train evaluate` writes `test.json` anew, but needs the card.
    test = _read_object(path / TEST, "evaluate the run again")
    card = _read_object(path / CARD, START_AGAIN)
    try:
        require_card_fields(card)
    except ValueError as error:
        raise ValueError(f"{CARD} is damaged ({error}); {START_AGAIN}") from error
    try:
        scores = {part: _score(test[part]) for part in COLUMNS}
        if test.get("split_tag") is not None:
            scores["split_tag"] = _score(test["split_tag"])
        scores |= {f"tag {tag}": _score(value) for tag, value in (test.get("tags") or {}).items()}
        system, split, seed = str(test["model"]), str(test["split"]), int(test.get("seed", card.get("seed", 0)))
        quarantined = int(test.get("unseen", 0))
        wrong_form = None if test.get("wrong_form") is None else int(test["wrong_form"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{TEST} is damaged ({type(error).__name__}: {error}); evaluate the run again") from error
    return Run(
        dir=path,
        system=system,
        split=split,
        seed=seed,
        scores=scores,
        val=_val(card.get("val")),
        card=card,
        quarantined=quarantined,
        wrong_form=wrong_form,
        seconds_to_converge=_seconds(path),
        questions=_read_object(path / QUESTIONS, START_AGAIN) if (path / QUESTIONS).exists() else {},
    )


def card_option(card: Mapping[str, Any], section: str, name: str) -> object:
    """An option of the experiment that a card describes; empty text if the card does not say."""
    return ((card.get("config") or {}).get(section) or {}).get(name, "")


def data_title(split: str, cards: Iterable[Mapping[str, Any]]) -> str:
    """Title of the questions of runs: EgoTaskQA's split, or for another data set the title from `own_title`."""
    titles: dict[str, None] = {}
    for card in cards:
        name, root, questions = (card_option(card, "data", option) for option in ("name", "root", "questions"))
        if name not in ("egotaskqa", ""):
            titles[own_title(Path(str(root)), str(questions) if questions else None)] = None
    return ", ".join(titles) or split


def _run_folders(folder: Path) -> list[Path]:
    """Folders of finished and unfinished runs below `folder`, without those of sweeps."""
    found = {path.parent for name in (TEST, CARD, LOG) for path in folder.glob(f"**/{name}")}
    return sorted(path for path in found if SWEEPS not in path.relative_to(folder).parts)


def _rows_of(system: str, split: str, runs: list[Run], folder: Path, problems: list[str]) -> list[Row]:
    """One row per setting of one system on one split."""
    settings: dict[str, list[Run]] = {}
    # Results of `train evaluate --from` come last: they have neither weights nor a log, and may repeat a trained run.
    for run in sorted(runs, key=lambda run: not (run.dir / WEIGHTS).exists()):
        setting = [run.options, run.features]
        settings.setdefault(json.dumps(setting, sort_keys=True, default=str), []).append(run)
    groups = sorted(settings.values(), key=lambda group: (-len(group), str(group[0].dir)))
    base = groups[0][0]
    differing = [
        (_differing(group[0].options, base.options), _differing(group[0].features, base.features)) for group in groups
    ]
    options_in_use = Counter(tuple(options) for options, _ in differing)
    rows = []
    for group, (options, features) in zip(groups, differing, strict=True):
        seeds: dict[int, Run] = {}
        for run in group:
            if why := _no_seed_of(group[0], run):
                names = run.dir.relative_to(folder), group[0].dir.relative_to(folder)
                problems.append(f"{names[0]}: ignored as a further seed of {names[1]}, because {why}")
                continue
            first = seeds.setdefault(run.seed, run)
            if first is not run:
                names = run.dir.relative_to(folder), first.dir.relative_to(folder)
                problems.append(
                    f"{names[0]}: ignored, because it repeats seed {run.seed} of {names[1]} with the same config"
                )
        ranked = sorted(seeds.values(), key=lambda run: (-(run.val if run.val is not None else -math.inf), run.seed))
        label = system
        if group is not groups[0]:
            # If options of stage one differ, so do the features, and the options say enough, unless another row has the
            # same ones: intervals and answers are looked up by label.
            enough = options and options_in_use[tuple(options)] == 1
            label = f"{system} ({', '.join(options if enough else options + features)})"
            questions = data_title(split, [run.card for run in runs])
            problems.append(f"{system} on {questions}: several settings were run; {label} has a separate row")
        rows.append(Row(label, system, split, tuple(ranked)))
    return rows


def _no_seed_of(first: Run, run: Run) -> str | None:
    """The reason why two runs of one setting cannot be averaged; None if they can."""
    kinds = [kind for kind in first.questions if run.questions.get(kind) != first.questions[kind]]
    if kinds and run.questions:  # earlier versions recorded none
        return f"it learned from other data (different: {', '.join(kinds)}); train one of the two again"
    counts = [[seed.scores[part].n for part in COLUMNS] for seed in (first, run)]
    if counts[0] != counts[1]:
        return f"it answers {counts[1][-1]:,} test questions instead of {counts[0][-1]:,}; evaluate both again"
    return None


def _entries(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Name and value of each option in a section, also of a head's own options: `head.options.width`."""
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items()):
            yield from _entries(f"{name}.{key}", inner)
    else:
        yield name, value


def _differing(values: Mapping[str, object], base: Mapping[str, object]) -> list[str]:
    """Name and value of each entry that differs from `base`."""
    names = sorted(name for name in values.keys() | base.keys() if values.get(name) != base.get(name))
    return [f"{name} {value_text(values.get(name))}" for name in names]


def _row_key(head: str, system: str, split: str) -> tuple[int, float, str, str]:
    """The order of the table: split, then `ORDER` of the heads; heads that are not in it come before ours."""
    place = ORDER.index(head) if head in ORDER else len(ORDER) - len(OURS) - 0.5
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), place, split, system)


def _score(value: Mapping[str, Any]) -> Score:
    accuracy, n = value["accuracy"], int(value["n"])
    if accuracy is None or n == 0:
        return Score(None, n)
    if not 0 <= float(accuracy) <= 100:
        raise ValueError(f"accuracy is {accuracy!r}; expected a percentage")
    return Score(float(accuracy), n)


def _val(val: object) -> float | None:
    value = val.get("all") if isinstance(val, Mapping) else None
    return float(value) if isinstance(value, int | float) and 0 <= value <= 100 else None


def _seconds(run: Path) -> float | None:
    """Seconds until a run converged, from its log; None if the log does not say."""
    path = run / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in reversed(lines):
        if '"converged"' in line:
            try:
                return float(json.loads(line)["seconds"])
            except (ValueError, KeyError, TypeError, OverflowError):
                return None
    return None


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}); {remedy}") from error
