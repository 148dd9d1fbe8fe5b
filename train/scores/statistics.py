"""Intervals and paired tests over seeds and questions, by resampling.

Questions about one clip are not independent, so clips are drawn rather than questions.

Shape legend: S seeds, Q questions, C clips, R draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How far one system is above another on the same questions.

    Attributes:
        difference: Difference of the means.
        p: Two-sided p-value: share of random swaps of the two systems, clip by clip, that differ at least as much.
    """

    difference: Interval
    p: float


def bootstrap(values: Matrix, clips: Sequence[str], seed: int = 0) -> Interval:
    """The mean of `values` [S, Q] and its interval over seeds and clips.

    Args:
        values: Value of each seed on each question.
        clips: Clip of each question, [Q].
        seed: Seed of the draws.

    Raises:
        ValueError: there are no values.
    """
    sums, counts = _by_clip(values, clips)
    seeds, generator = len(values), np.random.default_rng(seed)
    drawn = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS)  # [R, C]
    seed_means = (drawn @ sums.T) / (drawn @ counts)[:, None]  # [R, S]
    picked = generator.integers(seeds, size=(DRAWS, seeds))
    means = np.take_along_axis(seed_means, picked, axis=1).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def compare(ours: Matrix, theirs: Matrix, clips: Sequence[str], seed: int = 0) -> Comparison:
    """Whether `ours` [S, Q] is above `theirs` [S, Q]: same questions, and same seeds in the same order.

    Raises:
        ValueError: the shapes differ, or there are no values.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"ours is {ours.shape} and theirs {theirs.shape}; expected the same seeds and questions")
    difference = ours - theirs
    interval = bootstrap(difference, clips, seed)
    sums = _by_clip(difference.mean(axis=0, keepdims=True), clips)[0][0]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(DRAWS, len(sums)))
    # The observed arrangement counts as one of the possible ones.
    extreme = (np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum()
    return Comparison(interval, float((extreme + 1) / (DRAWS + 1)))


def _by_clip(values: Matrix, clips: Sequence[str]) -> tuple[Matrix, Matrix]:
    """Sums [S, C] and counts [C] of `values` [S, Q]."""
    if not values.size or values.ndim != 2 or values.shape[1] != len(clips):
        raise ValueError(f"values has shape {values.shape}; expected [seeds, {len(clips)}], not empty")
    _, index = np.unique(np.asarray(clips), return_inverse=True)
    counts = np.bincount(index).astype(float)
    return np.stack([np.bincount(index, weights=row, minlength=len(counts)) for row in values]), counts
