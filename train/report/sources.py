"""What the report reads beside the table: training logs, sweeps and selections.

Every reader returns what is there and raises `SourceError`, one line, for what is damaged; the report prints that line
in place of the figure.
"""

import json
import math
import statistics
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SourceError(ValueError):
    """A file of a run cannot be read; the message names it and what to do."""


@dataclass(frozen=True)
class TrainingLog:
    """What a run logged.

    Attributes:
        steps: optimiser steps at which the loss was logged, rising.
        losses: training loss at each of `steps`.
        epochs: epochs after which *val* was measured, rising.
        val: accuracy on all questions of *val* after each of `epochs`, percent.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    epochs: tuple[int, ...]
    val: tuple[float, ...]


@dataclass(frozen=True)
class SweepMember:
    """One point of a sweep: test accuracy over all questions, percent, and the folder it was trained in."""

    ratio: float
    seed: int
    setting: str
    accuracy: float
    n: int
    dir: Path | None


@dataclass(frozen=True)
class SweepPoint:
    """One setting at one ratio: accuracies of its seeds over `n` questions, percent.

    `interval` has the ends of the 95% interval over seeds and questions, where the sweep has it.
    """

    setting: str
    ratio: float
    accuracies: tuple[float, ...]
    n: int
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Sweep:
    """Members of one sweep, sorted by setting, ratio, seed.

    `setting` of a member names the options other than the ratio and the seed; it is empty for a plain ratio sweep.
    `intervals` are those of each setting and ratio.
    """

    name: str
    system: str
    split: str
    members: tuple[SweepMember, ...]
    intervals: Mapping[tuple[str, float], tuple[float, float]] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[str, ...]:
        """Distinct settings, in order."""
        return tuple(dict.fromkeys(member.setting for member in self.members))

    @property
    def points(self) -> tuple[SweepPoint, ...]:
        """Seeds gathered: settings in order, rising in ratio."""
        groups: dict[tuple[str, float], list[SweepMember]] = {}
        for member in self.members:
            groups.setdefault((member.setting, member.ratio), []).append(member)
        return tuple(
            SweepPoint(
                setting, ratio, tuple(m.accuracy for m in members), members[0].n, self.intervals.get((setting, ratio))
            )
            for (setting, ratio), members in groups.items()
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
        rows: row in `kept` of each question id.
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

        1 where the selection ignores the question; None where no clip has two questions.

        Args:
            clip_of: clip of each question id.
            patches: in a frame.
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
    """Read a run's `log.jsonl`. A torn last line, as a killed run leaves it, is passed over.

    Raises:
        SourceError: the file is missing or another line is damaged.
    """
    lines = _read_text(path).splitlines()
    steps: dict[int, float] = {}
    epochs: dict[int, float] = {}
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if event.get("event") == "step" and _finite(event.get("loss")):
                steps[int(event["step"])] = float(event["loss"])
            elif event.get("event") == "val" and _finite(event.get("all")):
                epochs[int(event["epoch"])] = float(event["all"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            if number == len(lines):
                break
            raise SourceError(f"{path}:{number} is no log event ({error}); train the run again") from error
    return TrainingLog(
        tuple(sorted(steps)),
        tuple(steps[step] for step in sorted(steps)),
        tuple(sorted(epochs)),
        tuple(epochs[epoch] for epoch in sorted(epochs)),
    )


def read_sweep(path: Path) -> Sweep:
    """Read a `sweep.json`.

    Raises:
        SourceError: the file is damaged.
    """
    try:
        value = json.loads(_read_text(path))
        members = [_member(entry, path.parent) for entry in value["members"]]
        members.sort(key=lambda member: (member.setting, member.ratio, member.seed))
        intervals = {
            (_setting(point["setting"]), float(point["ratio"])): (
                float(point["all"]["low"]),
                float(point["all"]["high"]),
            )
            for point in value.get("points", ())
        }
        return Sweep(str(value["name"]), str(value["model"]), str(value["split"]), tuple(members), intervals)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise SourceError(f"{path} is no sweep ({type(error).__name__}: {error}); run the sweep again") from error


def read_selection(path: Path) -> Selection:
    """Read `selection.npz`.

    Raises:
        SourceError: the file is missing or damaged.
    """
    if not path.exists():
        raise SourceError(f"{path} is missing; evaluate the run again")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            ids, kept = arrays["question_ids"], arrays["kept"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is damaged ({error}); evaluate the run again") from error
    if kept.ndim != 3 or len(ids) != len(kept):
        raise SourceError(f"{path} has kept {kept.shape} for {len(ids)} questions; expected [Q, T, k]")
    return Selection({str(question): row for row, question in enumerate(ids)}, kept)


def _member(entry: Mapping[str, Any], folder: Path) -> SweepMember:
    setting = _setting(entry.get("overrides") or {})
    dir_ = _existing(entry.get("dir"), folder)
    return SweepMember(float(entry["ratio"]), int(entry["seed"]), setting, float(entry["all"]), int(entry["n"]), dir_)


def _setting(overrides: Mapping[str, Any]) -> str:
    """The options other than the ratio and the seed, as text."""
    others = {key: value for key, value in overrides.items() if key.rsplit(".", 1)[-1] not in ("ratio", "seed", "dir")}
    return ", ".join(f"{key} {_plain(value)}" for key, value in sorted(others.items()))


def _existing(value: object, folder: Path) -> Path | None:
    """A member's folder, whether written relative to the sweep or to the working directory."""
    if not value:
        return None
    return next((path for path in (folder / str(value), Path(str(value))) if path.is_dir()), None)


def _plain(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing; evaluate the run again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}); make it again") from error
