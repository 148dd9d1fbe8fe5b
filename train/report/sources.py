"""Files that the report reads in addition to the results: training logs, sweeps and selections.

A reader raises `SourceError` with a message of one line for a damaged file; the report prints that line in place of the
figure.
"""

import json
import statistics
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egopatch.train.rundir.names import TEST
from egopatch.train.rundir.results import START_AGAIN, value_text

# Options outside a sweep run's setting: those that it states separately, and the folder.
_OUTSIDE_SETTING = {"head.ratio", "train.seed", "run.dir"}


class SourceError(ValueError):
    """A file of a run cannot be read; the message names the file and what to do."""


@dataclass(frozen=True)
class TrainingLog:
    """Losses and accuracies that a run logged.

    Attributes:
        steps: Optimiser steps at which the loss was logged, rising.
        losses: Training loss at each of `steps`.
        epochs: Epochs after which *val* was measured, rising.
        val: Accuracy over all questions of *val* after each of `epochs`, percent.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    epochs: tuple[int, ...]
    val: tuple[float, ...]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its test accuracy over all questions, percent, and its folder."""

    ratio: float
    seed: int
    setting: str
    accuracy: float
    n: int
    dir: Path | None


@dataclass(frozen=True)
class SweepPoint:
    """One setting at one ratio: accuracies of its seeds over `n` questions, percent.

    `interval` is the 95% interval over seeds and questions; None if the sweep has none.
    """

    setting: str
    ratio: float
    accuracies: tuple[float, ...]
    n: int
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def band(self) -> tuple[float, float]:
        """The interval, or else the range of the seeds."""
        return self.interval or (min(self.accuracies), max(self.accuracies))


@dataclass(frozen=True)
class Sweep:
    """Runs of one sweep, sorted by setting, ratio and seed.

    The `setting` of a run names its options other than the ratio and the seed; it is empty for a plain ratio sweep.
    `intervals` has the 95% interval of each setting and ratio, `command` the command that made the sweep.
    """

    name: str
    system: str
    split: str
    runs: tuple[SweepRun, ...]
    intervals: Mapping[tuple[str, float], tuple[float, float]] = field(default_factory=dict)
    command: str = ""

    @property
    def settings(self) -> tuple[str, ...]:
        """Distinct settings, in order."""
        return tuple(dict.fromkeys(run.setting for run in self.runs))

    @property
    def points(self) -> tuple[SweepPoint, ...]:
        """One point per setting and ratio: settings in order, rising in ratio."""
        groups: dict[tuple[str, float], list[SweepRun]] = {}
        for run in self.runs:
            groups.setdefault((run.setting, run.ratio), []).append(run)
        return tuple(
            SweepPoint(
                setting, ratio, tuple(run.accuracy for run in runs), runs[0].n, self.intervals.get((setting, ratio))
            )
            for (setting, ratio), runs in groups.items()
        )

    def curve(self, setting: str) -> tuple[SweepPoint, ...]:
        """The points of one setting, rising in ratio."""
        return tuple(point for point in self.points if point.setting == setting)

    @property
    def varies_ratio(self) -> bool:
        """Whether any setting was trained at several ratios."""
        return any(len(self.curve(setting)) > 1 for setting in self.settings)


@dataclass(frozen=True)
class Selection:
    """Patches that a head kept.

    Attributes:
        rows: Row in `kept` of each question id.
        kept: [Q, T, k] patch indices, row-major in the grid.
    """

    rows: Mapping[str, int]
    kept: NDArray[np.int16]

    def frequency(self, patches: int) -> NDArray[np.float64]:
        """Share of (question, frame) pairs in which each of `patches` patches is kept: [patches]."""
        q, t, _ = self.kept.shape
        inside = self.kept[(self.kept >= 0) & (self.kept < patches)]
        return np.bincount(inside.ravel(), minlength=patches) / max(q * t, 1)

    def shared(self, clip_of: Mapping[str, str], patches: int) -> float | None:
        """Share of a question's kept patches that another question about the same clip keeps too: mean over pairs.

        1 if the selection ignores the question; None if no clip has two questions.

        Args:
            clip_of: Clip of each question id.
            patches: Patches in a frame.
        """
        by_clip: dict[str, list[int]] = {}
        for question, row in self.rows.items():
            if question in clip_of:
                by_clip.setdefault(clip_of[question], []).append(row)
        agreeing = possible = 0
        for rows in by_clip.values():
            kept = self.kept[rows].astype(np.int64)
            valid = (kept >= 0) & (kept < patches)
            frame = np.broadcast_to(np.arange(kept.shape[1])[None, :, None], kept.shape)
            counts = np.bincount(frame[valid] * patches + kept[valid], minlength=kept.shape[1] * patches)
            agreeing += int((counts * (counts - 1)).sum())
            possible += int(valid.sum()) * (len(rows) - 1)
        return agreeing / possible if possible else None


def read_log(path: Path) -> TrainingLog:
    """Read a run's `log.jsonl`. A torn last line, as a killed run leaves it, is ignored.

    Raises:
        SourceError: The file is missing or another line is damaged.
    """
    lines = _read_text(path).splitlines()
    steps: dict[int, float] = {}
    epochs: dict[int, float] = {}
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if event.get("event") == "step" and _drawable(event.get("loss")):
                steps[int(event["step"])] = float(event["loss"])
            elif event.get("event") == "val" and _drawable(event.get("all")):
                epochs[int(event["epoch"])] = float(event["all"])
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            if number == len(lines):
                break
            raise SourceError(f"{path}:{number} is not a log event ({error}); {START_AGAIN}") from error
    steps, epochs = dict(sorted(steps.items())), dict(sorted(epochs.items()))
    return TrainingLog(tuple(steps), tuple(steps.values()), tuple(epochs), tuple(epochs.values()))


def read_sweep(path: Path) -> Sweep:
    """Read a `sweep.json`. Runs without an accuracy are omitted.

    Raises:
        SourceError: The file is damaged.
    """
    try:
        value = json.loads(_read_text(path))
        # If no test question has a published answer, runs have no accuracy.
        runs = [_sweep_run(entry, path.parent) for entry in value["members"] if entry["all"] is not None]
        runs.sort(key=lambda run: (run.setting, run.ratio, run.seed))
        intervals = {
            (_setting(point["setting"]), float(point["ratio"])): (
                _percent(point["all"]["low"]),
                _percent(point["all"]["high"]),
            )
            for point in value.get("points", ())
        }
        system = str(value.get("system") or _system_of(runs) or value["model"])
        name, split, command = str(value["name"]), str(value["split"]), str(value.get("command") or "")
        return Sweep(name, system, split, tuple(runs), intervals, command)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, OSError, RecursionError) as error:
        raise SourceError(f"{path} is not a sweep ({type(error).__name__}: {error}); run the sweep again") from error


def read_selection(path: Path) -> Selection:
    """Read `selection.npz`.

    Raises:
        SourceError: The file is missing or damaged.
    """
    if not path.exists():
        raise SourceError(f"{path} is missing; evaluate the run again")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            ids, kept = arrays["question_ids"], arrays["kept"]
    # zipfile raises errors of many kinds for damaged files; a wrong shape in a header asks for all memory.
    except (
        OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise SourceError(f"{path} is damaged ({error}); evaluate the run again") from error
    if kept.ndim != 3 or ids.shape != kept.shape[:1] or kept.dtype != np.int16:
        raise SourceError(
            f"{path} has kept {kept.shape} {kept.dtype} for questions {ids.shape}; expected [Q, T, k] int16 for [Q]; "
            "evaluate the run again"
        )
    return Selection({str(question): row for row, question in enumerate(ids)}, kept)


def _sweep_run(entry: Mapping[str, Any], folder: Path) -> SweepRun:
    ratio = float(entry["ratio"])
    if not 0 < ratio <= 1:
        raise ValueError(f"a ratio is {ratio}; expected a share in (0, 1]")
    return SweepRun(
        ratio=ratio,
        seed=int(entry["seed"]),
        setting=_setting(entry.get("overrides") or {}),
        accuracy=_percent(entry["all"]),
        n=int(entry["n"]),
        dir=_existing(entry.get("dir"), folder),
    )


def _percent(value: Any) -> float:
    percent = float(value)
    if not 0 <= percent <= 100:
        raise ValueError(f"an accuracy is {percent}; expected a percentage")
    return percent


def _system_of(runs: Sequence[SweepRun]) -> str | None:
    """System of a sweep written by an earlier version, read from its runs' results; None if none can be read."""
    for run in runs:
        try:
            return str(json.loads(_read_text((run.dir or Path()) / TEST))["model"])
        except (SourceError, ValueError, KeyError, TypeError):
            continue
    return None


def _setting(overrides: Mapping[str, Any]) -> str:
    """The options other than the ratio and the seed, as text."""
    # Full names: a registered head may have an option `ratio` of its own, which is part of the setting.
    others = {option: value for option, value in overrides.items() if option not in _OUTSIDE_SETTING}
    return ", ".join(f"{option} {value_text(value)}" for option, value in sorted(others.items()))


def _existing(value: object, folder: Path) -> Path | None:
    """Folder of a run, given relative to the sweep's folder or to the working directory; None if missing."""
    if not value:
        return None
    return next((path for path in (folder / str(value), Path(str(value))) if path.is_dir()), None)


def _drawable(value: object) -> bool:
    """Whether a number is finite in float32, as all losses and accuracies are unless a run has diverged."""
    return isinstance(value, int | float) and abs(value) < 2.0**128


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing; evaluate the run again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}); write it again") from error
