"""`explanation.json` of a run: which patches matter to its answers, by every score that ranks them."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egopatch.features.io.fields import get_count
from egopatch.train.explanation.agreement import Agreement
from egopatch.train.rundir.checked_json import read_object
from egopatch.train.rundir.run_folder import write_whole
from egopatch.train.scores.statistics import Interval

EXPLANATION = "explanation.json"


class ExplanationError(ValueError):
    """The file is missing or damaged; the message names it and what to do."""


@dataclass(frozen=True)
class Ranking:
    """Measurements of one score that ranks patches.

    Attributes:
        name: `selection` (the score by which psa keeps patches), `question`, `saliency` or `prior` (its parts),
            `known places` (EgoSynth's) or `random`.
        deletion: Probability of the head's answer at each share of deleted patches, in percent, mean over questions.
        insertion: The same at each share of inserted patches.
        deletion_gap: Points by which the area below the deletion curve is above that of a random order, with its 95%
            interval over clips; None for `random`.
        insertion_gap: The same for insertion.
        agreement: Agreement of the k patches with the highest scores in each frame with EgoSynth's known places.
        pointing: Percentage of frames whose patch with the highest score is the place of an object asked about.
    """

    name: str
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    deletion_gap: Interval | None
    insertion_gap: Interval | None
    agreement: Agreement | None
    pointing: float | None

    @property
    def deletion_area(self) -> float:
        """Mean height of the deletion curve, whose shares are evenly spaced."""
        return _mean_height(self.deletion)

    @property
    def insertion_area(self) -> float:
        """Mean height of the insertion curve."""
        return _mean_height(self.insertion)


@dataclass(frozen=True)
class Explanation:
    """Every ranking, measured on the same questions of *test*.

    Attributes:
        questions: Number of questions.
        k: Patches of a frame that count as chosen.
        patches: Patches in a frame.
        shares: Shares of the curves, evenly spaced from 0 to 1.
    """

    questions: int
    k: int
    patches: int
    shares: tuple[float, ...]
    rankings: tuple[Ranking, ...]

    def write(self, folder: Path) -> Path:
        """Write `explanation.json` into a run's folder; returns its path."""
        path = folder / EXPLANATION
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        return path


def read_explanation(folder: Path) -> Explanation | None:
    """Read the file of a run; None if the run was not explained.

    Raises:
        ExplanationError: The file is damaged.
    """
    path = folder / EXPLANATION
    if not path.exists():
        return None
    try:
        values = read_object(path)
        shares = tuple(map(_number, values["shares"]))
        rankings = tuple(_ranking(ranking, len(shares)) for ranking in values["rankings"])
        questions, k, patches = (get_count(values, name) for name in ("questions", "k", "patches"))
        return Explanation(questions, k, patches, shares, rankings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ExplanationError(
            f"{path} is damaged ({error}); delete it and run `egopatch train explain` again"
        ) from error


def _ranking(values: dict[str, Any], shares: int) -> Ranking:
    def optional(kind: type, name: str) -> Any:
        return None if values[name] is None else kind(**{part: _number(value) for part, value in values[name].items()})

    def curve(name: str) -> tuple[float, ...]:
        heights = tuple(map(_number, values[name]))
        if len(heights) != shares or shares < 2:
            raise ValueError(
                f"{name!r} has {len(heights)} points for {shares} shares; expected one for each share, and at least 2"
            )
        return heights

    return Ranking(
        name=str(values["name"]),
        deletion=curve("deletion"),
        insertion=curve("insertion"),
        deletion_gap=optional(Interval, "deletion_gap"),
        insertion_gap=optional(Interval, "insertion_gap"),
        agreement=optional(Agreement, "agreement"),
        pointing=None if values["pointing"] is None else _number(values["pointing"]),
    )


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"found {number}; expected a finite number")
    return number


def _mean_height(curve: tuple[float, ...]) -> float:
    return (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)
