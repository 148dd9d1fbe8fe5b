"""Bootstrap intervals over seeds and clips, and the paired permutation test."""

import itertools

import numpy as np
import pytest

from egopatch.train.scores.statistics import bootstrap, compare


def test_equal_values_have_no_spread() -> None:
    found = bootstrap(np.full((3, 8), 60.0), list("aabbccdd"))
    assert (found.mean, found.low, found.high) == (60.0, 60.0, 60.0)


def test_clips_are_drawn_and_not_questions() -> None:
    right = np.array([[100.0] * 4 + [0.0] * 4])
    alone, together = bootstrap(right, list("abcdefgh")), bootstrap(right, list("aaaabbbb"))
    assert (together.low, together.high) == (0.0, 100.0)
    assert 0 < alone.low < 50 < alone.high < 100


def test_seeds_widen_the_interval() -> None:
    clips = [str(i) for i in range(200)]
    apart = np.stack([np.full(200, 40.0), np.full(200, 50.0), np.full(200, 60.0)])
    found = bootstrap(apart, clips)
    assert found.mean == 50
    assert found.low < 45
    assert found.high > 55


def test_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(60):
        found = bootstrap(generator.random((1, 400)) < 0.3, [str(i) for i in range(400)], seed=trial)
        hits += found.low <= 0.3 <= found.high
    assert 51 <= hits <= 60  # 95% of 60 is 57; under 51 or so would be one in a thousand


def test_interval_is_that_of_drawing_seeds_and_clips_one_by_one() -> None:
    """The same resampling written out, with loops over what was drawn, and other random numbers."""
    generator = np.random.default_rng(4)
    clips = [f"c{i}" for i in range(30) for _ in range(1 + i % 4)]
    right = 100.0 * (generator.random((3, len(clips))) < np.linspace(0.2, 0.8, len(clips)))
    questions = {name: [q for q, clip in enumerate(clips) if clip == name] for name in set(clips)}
    names, means = sorted(questions), []
    for _ in range(3000):
        drawn = [q for i in generator.integers(len(names), size=len(names)) for q in questions[names[i]]]
        means.append(np.mean([right[seed, drawn].mean() for seed in generator.integers(3, size=3)]))
    low, high = np.percentile(means, [2.5, 97.5])
    found = bootstrap(right, clips)
    assert found.mean == pytest.approx(right.mean())
    # The ends of 2,000 and of 3,000 draws vary by about 3% of the width each.
    assert found.low == pytest.approx(low, abs=0.12 * (high - low))
    assert found.high == pytest.approx(high, abs=0.12 * (high - low))


def test_the_permutation_test_is_that_of_all_arrangements() -> None:
    """Against every one of the 2^10 ways to swap the two systems, clip by clip."""
    generator = np.random.default_rng(6)
    clips = [f"c{i // 2}" for i in range(20)]
    ours, theirs = (100.0 * (generator.random((1, 20)) < share) for share in (0.75, 0.4))
    each = (ours - theirs)[0].reshape(10, 2).sum(axis=1)
    ways = [sum(sign * part for sign, part in zip(signs, each)) for signs in itertools.product((-1, 1), repeat=10)]
    exact = np.mean([abs(way) >= abs(each.sum()) - 1e-9 for way in ways])
    assert 0.005 < exact < 0.5
    found = np.mean([compare(ours, theirs, clips, seed).p for seed in range(20)])
    # Three standard deviations of a share of 40,000 draws, and the arrangement seen that is counted in.
    assert found == pytest.approx(exact, abs=3 * np.sqrt(exact / 40_000) + 1 / 2000)


def test_comparison_finds_what_is_there_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    clips = [str(i // 2) for i in range(600)]
    base = (generator.random((3, 600)) < 0.4).astype(float)
    better = np.maximum(base, generator.random((3, 600)) < 0.1)
    found = compare(better, base, clips)
    assert found.p < 0.01
    assert 0 < found.difference.low < found.difference.mean < found.difference.high
    assert compare(base, base, clips).p == 1.0
    swapped = compare(base, better, clips)
    assert swapped.difference.mean == pytest.approx(-found.difference.mean)
    assert swapped.p == found.p


def test_chance_is_called_significant_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    clips = [str(i) for i in range(100)]
    small = sum(
        compare(*(generator.random((2, 1, 100)) < 0.5).astype(float), clips, seed=trial).p < 0.1 for trial in range(100)
    )
    assert 1 <= small <= 22  # 10 are expected; the bounds are three standard deviations away


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same seeds and questions"):
        compare(np.zeros((1, 2)), np.zeros((2, 2)), ["a", "b"])
    with pytest.raises(ValueError, match=r"expected \[seeds, 0\], not empty"):
        bootstrap(np.zeros((1, 0)), [])
