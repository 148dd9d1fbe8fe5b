"""Accuracies and their differences, with 95% intervals that treat both seeds and clips as samples.

Another training seed and other clips of the same kind would give other accuracies, and questions about one clip are
not independent. So the answers form a table of seeds by clips, and the variance of their mean has a part for the seeds,
one for the clips, and one for both together. Three seeds give only a rough variance, so each part has Student's
quantile for its own number of samples, weighted by its variance. Drawing three seeds with replacement, as a bootstrap
does, leaves that uncertainty out: its 95% intervals can hold the truth in fewer than 80% of cases, where these hold it
in 94 to 97% (`tests/train/test_statistics.py`). Where nothing varies at all, as in a small set whose questions are all
answered right, the interval says how many clips of another kind could have been missed (`_Spread.unseen_share`).

Sources: the variance is that of S. L. Hillis, Statistics in Medicine 26 (2007), whose readers and cases are seeds and
clips here; the quantile is that of W. G. Cochran and G. M. Cox, Experimental Designs (1950), for unequal variances.

Shape legend: S seeds, Q questions, C clips.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
# Probability with which a difference should be found.
POWER = 0.8
MOST_SEEDS = 1000
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean in percent, or a difference in points, with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of one system with another on the same questions.

    Attributes:
        difference: Difference of the accuracies, in points.
        p: Two-sided p-value by the same method: below 0.05 if the interval excludes zero.
    """

    difference: Interval
    p: float

    @property
    def verdict(self) -> Literal["above", "below", "cannot be told apart"]:
        """Whether the interval lies above zero, below zero, or contains it."""
        if self.difference.low > 0:
            return "above"
        return "below" if self.difference.high < 0 else "cannot be told apart"


@dataclass(frozen=True)
class Power:
    """Precision with which a set of questions compares systems.

    Attributes:
        seed_variance: Variance of a system's accuracy from seed to seed, in squared points.
        clip_variance: Variance of the difference of two systems that remains with any number of seeds.
    """

    seed_variance: float
    clip_variance: float

    def seeds_needed(self, points: float) -> int | None:
        """Number of seeds per system that finds a true difference of `points` in 80% of cases; None if the clips are
        too few for it, whatever the number of seeds (up to 1,000).
        """
        seeds = range(2, MOST_SEEDS + 1)
        place = bisect_left(seeds, True, key=lambda count: self._finds(points, count))
        return seeds[place] if place < len(seeds) else None

    def _finds(self, points: float, seeds: int) -> bool:
        spread = _Spread(2 * self.seed_variance / seeds, 2 * (seeds - 1), self.clip_variance, math.inf)
        return points >= spread.half_width(CONFIDENCE) + spread.half_width(2 * POWER - 1)


def accuracy(right: ArrayLike, clips: Sequence[str] | Sequence[int]) -> Interval:
    """The accuracy of a system with its interval.

    Args:
        right: [S, Q], 1 where a seed answers a question right and 0 where not. With one seed, the interval leaves out
            the spread between seeds.
        clips: Clip of each question, [Q].

    Raises:
        ValueError: There are no values.
    """
    parts = _Parts.of(right, clips)
    return _interval(parts.mean, parts.spread(parts.clip_effects), bounds=(0, 100))


def interval(scores: ArrayLike, effects: ArrayLike) -> Interval:
    """The mean of any score with its interval, such as that of all answers together.

    Args:
        scores: [S] score of each seed, in percent.
        effects: [S, C] shift of each seed's score by each clip, times C, to first order; each row sums to zero.
    """
    parts = _Parts.of_effects(np.asarray(scores, dtype=float), np.asarray(effects, dtype=float))
    return _interval(parts.mean, parts.spread(parts.clip_effects), bounds=(0, 100))


def clip_sums(values: ArrayLike, clips: Sequence[str] | Sequence[int]) -> Matrix:
    """Sums [..., C] over the questions of each clip, of values [..., Q]."""
    values = np.asarray(values, dtype=float)
    _, index = np.unique(np.asarray(clips), return_inverse=True)
    rows = values.reshape(-1, values.shape[-1])
    sums = np.array([np.bincount(index, weights=row) for row in rows], dtype=float)
    return sums.reshape(*values.shape[:-1], -1)


def compare(ours: ArrayLike, theirs: ArrayLike, clips: Sequence[str] | Sequence[int]) -> Comparison:
    """The lead of `ours` [S, Q] over `theirs` [R, Q] on the same questions.

    Questions are paired. Seeds are not: what a seed does to one setting says little about another.

    Raises:
        ValueError: The questions differ, or there are no values.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"ours is {ours.shape} and theirs {theirs.shape}; expected the same questions")
    first, second = _Parts.of(ours, clips), _Parts.of(theirs, clips)
    difference = first.mean - second.mean
    spread = first.spread(first.clip_effects - second.clip_effects, second)
    p = spread.outside(abs(difference), of=abs(difference) + 100) if spread.clips_freedom else 1.0
    return Comparison(_interval(difference, spread, bounds=(-100, 100)), p)


def measure_power(systems: Sequence[ArrayLike], clips: Sequence[str] | Sequence[int]) -> Power | None:
    """The power of comparisons between such systems, each [S, Q]. None without two systems of at least two seeds, or if
    all of them answer alike, which says nothing about systems that do not.
    """
    parts = [_Parts.of(right, clips) for right in systems]
    parts = [part for part in parts if part.seeds > 1]
    if len(parts) < 2:
        return None
    seed_variance = float(np.mean([part.of_seeds * part.seeds for part in parts]))
    pairs = [(a, b, _of_clips(a.clip_effects - b.clip_effects)) for a, b in combinations(parts, 2)]
    remaining = [max(variance - a.of_both - b.of_both, 0.0) for a, b, variance in pairs]
    if not seed_variance and not any(remaining):
        return None
    return Power(seed_variance, float(np.mean(remaining)))


@dataclass(frozen=True)
class _Spread:
    """The variance of a mean: its parts from seeds and from clips, each with its degrees of freedom."""

    of_seeds: float
    seeds_freedom: float
    of_clips: float
    clips_freedom: float

    @property
    def variance(self) -> float:
        return self.of_seeds + self.of_clips

    def half_width(self, confidence: float) -> float:
        """Distance from the mean within which the truth lies with probability `confidence`."""
        return float(self._half_widths(np.array([confidence]))[0])

    def unseen_share(self, confidence: float) -> float:
        """The share of all clips that a sample of C clips misses entirely with probability (1 - `confidence`) / 2.

        For accuracies of 0 or 100 it gives the interval of C. J. Clopper and E. S. Pearson, Biometrika 26 (1934).
        """
        return float(1 - ((1 - confidence) / 2) ** (1 / (self.clips_freedom + 1)))

    def outside(self, distance: float, of: float) -> float:
        """The p-value of `distance`: one minus the confidence of the interval that just reaches it.

        One clip can shift the mean by at most `of` points, times C.
        """
        if distance == 0:
            return 1.0
        if not self.variance:
            return min(2 * (1 - distance / of) ** (self.clips_freedom + 1), 1.0)
        # Finer and finer towards 1.
        confidences = 1 - np.logspace(0, -9, 2000)
        return float(1 - np.interp(distance, self._half_widths(confidences), confidences))

    def _half_widths(self, confidences: Matrix) -> Matrix:
        widths = np.zeros_like(confidences)
        for part, freedom in ((self.of_seeds, self.seeds_freedom), (self.of_clips, self.clips_freedom)):
            if part:
                widths += part * _student_quantile(confidences, freedom)
        return widths / math.sqrt(self.variance)


@dataclass(frozen=True)
class _Parts:
    """The mean of one system in percent, and the parts of its variance.

    Attributes:
        seeds: S.
        mean: Accuracy over seeds and questions.
        clip_effects: [C] shift of the mean by each clip, times C; they sum to zero.
        of_seeds: Variance of the mean from the seeds, including that from seeds and clips together.
        of_both: Variance from seeds and clips together: seeds differ more on some clips than on others.
    """

    seeds: int
    mean: float
    clip_effects: Matrix
    of_seeds: float
    of_both: float

    @classmethod
    def of(cls, right: ArrayLike, clips: Sequence[str] | Sequence[int]) -> "_Parts":
        values = 100 * np.asarray(right, dtype=float)
        if not values.size or values.ndim != 2 or values.shape[1] != len(clips):
            raise ValueError(f"values have shape {values.shape}; expected [seeds, {len(clips)}], not empty")
        counts = clip_sums(np.ones(len(clips)), clips)
        means = values.mean(axis=1)
        # Clips have different numbers of questions, so the mean is a ratio of sums; these are its linear terms.
        return cls.of_effects(means, (clip_sums(values, clips) - means[:, None] * counts) / counts.mean())

    @classmethod
    def of_effects(cls, means: Matrix, effects: Matrix) -> "_Parts":
        """Parts of the variance, from the seeds' means [S] and the clips' shifts of them, `effects` [S, C] / C."""
        seeds, count = effects.shape
        of_clip = effects.mean(axis=0)
        of_seeds = of_both = 0.0
        if seeds > 1:
            of_seeds = float(means.var(ddof=1)) / seeds
            if count > 1:
                squares = float(((effects - of_clip) ** 2).sum()) / ((seeds - 1) * (count - 1))
                of_both = squares / (seeds * count)
        return cls(seeds, float(means.mean()), of_clip, of_seeds, of_both)

    def spread(self, clip_effects: Matrix, other: "_Parts | None" = None) -> _Spread:
        """Spread of the mean, or of its difference from `other`; `clip_effects` [C] are the clips' effects on it."""
        systems = [self] if other is None else [self, other]
        of_seeds = sum(system.of_seeds for system in systems)
        # The clips' effects contain the part of seeds and clips together, which the seeds' part already includes.
        of_both = sum(system.of_both for system in systems)
        of_clips = max(_of_clips(clip_effects) - of_both, 0.0)
        if of_seeds + of_clips < of_both:
            # By chance the seeds' means lie close together; their differences on single clips remain.
            uncertain = sum(
                system.of_both**2 / ((system.seeds - 1) * (len(clip_effects) - 1))
                for system in systems
                if system.of_both
            )
            return _Spread(of_both, of_both**2 / uncertain, 0.0, len(clip_effects) - 1)
        uncertain = sum(system.of_seeds**2 / (system.seeds - 1) for system in systems if system.seeds > 1)
        seeds_freedom = of_seeds**2 / uncertain if uncertain else math.inf
        return _Spread(of_seeds, seeds_freedom, of_clips, len(clip_effects) - 1)


def _of_clips(effects: Matrix) -> float:
    """Variance of a mean from the clips, whose effects on it [C] sum to zero."""
    return float((effects**2).sum()) / (len(effects) * max(len(effects) - 1, 1))


def _interval(mean: float, spread: _Spread, bounds: tuple[float, float]) -> Interval:
    low, high = bounds
    if not spread.clips_freedom:  # one clip tells nothing about others
        return Interval(mean, low, high)
    if not spread.variance:
        share = spread.unseen_share(CONFIDENCE)
        return Interval(mean, mean - share * (mean - low), mean + share * (high - mean))
    half = spread.half_width(CONFIDENCE)
    return Interval(mean, max(mean - half, low), min(mean + half, high))


@lru_cache(maxsize=32)
def _student(freedom: float) -> tuple[Matrix, Matrix]:
    """Angles a, and the probability that Student's t lies within sqrt(freedom) * tan(a), by the trapezoidal rule."""
    # Denser near zero, where many degrees of freedom concentrate everything.
    angles = np.linspace(0, 1, 20_001) ** 2 * (math.pi / 2)
    density = np.cos(angles) ** (freedom - 1)
    steps = (density[1:] + density[:-1]) / 2 * np.diff(angles)
    inside = np.concatenate([[0.0], steps.cumsum()])
    return angles, inside / inside[-1]


def _student_quantile(inside: Matrix, freedom: float) -> Matrix:
    """The distances within which Student's t lies with these probabilities."""
    freedom = min(freedom, 1e5)  # from there on it is the normal distribution
    angles, shares = _student(freedom)
    return math.sqrt(freedom) * np.tan(np.interp(inside, shares, angles))
