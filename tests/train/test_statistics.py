"""Intervals over seeds and clips: their coverage on simulated experiments, and known cases."""

import numpy as np
import pytest

from egopatch.train.scores.statistics import accuracy, compare, measure_power

CLIPS, TRUTH = 80, 50.0
# Standard deviation between seeds, in points, and the additional one of each seed on each clip.
EXPERIMENTS = {
    "seeds alike": (0.5, 0.0),
    "seeds 2 points apart": (2.0, 0.0),
    "seeds 5 points apart": (5.0, 0.0),
    "seeds 10 points apart": (10.0, 0.0),
    "seeds differ by clip": (2.0, 15.0),
}


class MadeUp:
    """Simulated experiments with a known truth: clips of 1 to 9 questions with varying difficulty, and seeds."""

    def __init__(self, seed_sd: float, both_sd: float, generator: np.random.Generator) -> None:
        self.seed_sd, self.both_sd, self.generator = seed_sd, both_sd, generator
        self.index = np.repeat(np.arange(CLIPS), generator.integers(1, 10, size=CLIPS))
        self.clips = self.index.tolist()
        self.easy = generator.uniform(-18, 18, CLIPS)

    def system(self, seeds: int, above: float = 0.0) -> np.ndarray:
        """The answers of a system [S, Q], right in `TRUTH` percent of all cases, or `above` that."""
        draw = self.generator.normal
        share = TRUTH + above + self.easy + draw(scale=self.seed_sd, size=(seeds, 1))
        share = share + draw(scale=self.both_sd, size=(seeds, CLIPS))
        return 100 * self.generator.random((seeds, len(self.index))) < share[:, self.index]


def resampled(right: np.ndarray, index: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The interval of a bootstrap that draws seeds and clips, written out."""
    counts = np.bincount(index).astype(float)
    sums = np.stack([np.bincount(index, weights=row) for row in right])
    drawn = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=400)
    means = (drawn @ sums.T) / (drawn @ counts)[:, None]
    seeds = generator.integers(len(right), size=(400, len(right)))
    low, high = np.percentile(100 * np.take_along_axis(means, seeds, axis=1).mean(axis=1), [2.5, 97.5])
    return low, high


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_intervals_over_three_seeds_have_their_nominal_coverage(kind: str) -> None:
    generator = np.random.default_rng(7)
    held, p = 0, []
    for _ in range(1000):
        experiment = MadeUp(*EXPERIMENTS[kind], generator)
        ours, theirs = experiment.system(3), experiment.system(3)
        found = accuracy(ours, experiment.clips)
        held += found.low <= TRUTH <= found.high
        p.append(compare(ours, theirs, experiment.clips).p)
    assert 920 <= held <= 970
    # Uniform: the largest distance between the shares of p-values and p; 0.0515 would be one in a hundred.
    assert np.abs(np.sort(p) - (np.arange(1000) + 0.5) / 1000).max() < 0.08
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.065


def test_a_bootstrap_over_three_seeds_undercovers() -> None:
    """The reason why the statistics module does not resample."""
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(150):
        experiment = MadeUp(*EXPERIMENTS["seeds 10 points apart"], generator)
        low, high = resampled(experiment.system(3), experiment.index, generator)
        held += low <= TRUTH <= high
    assert held < 0.87 * 150


def test_with_many_seeds_the_interval_matches_a_bootstrap() -> None:
    generator = np.random.default_rng(5)
    experiment = MadeUp(4.0, 0.0, generator)
    right = experiment.system(40)
    low, high = resampled(right, experiment.index, generator)
    found = accuracy(right, experiment.clips)
    assert found.mean == pytest.approx(100 * right.mean())
    assert found.low == pytest.approx(low, abs=0.2 * (high - low))
    assert found.high == pytest.approx(high, abs=0.2 * (high - low))


def test_identical_answers_give_exact_binomial_intervals() -> None:
    found = accuracy(np.ones((3, 8)), list("aabbccdd"))
    # Clopper and Pearson's interval for 4 of 4, and the sign test.
    assert (found.mean, found.low, found.high) == pytest.approx((100, 100 * 0.025**0.25, 100))
    compared = compare(np.ones((2, 4)), np.zeros((2, 4)), list("abcd"))
    assert compared.p == pytest.approx(2 * 0.5**4)
    assert (compared.verdict, compared.difference.high) == ("cannot be told apart", 100)
    assert compare(np.ones((1, 6)), np.zeros((1, 6)), list("abcdef")).verdict == "above"
    same = compare(np.ones((1, 6)), np.ones((1, 6)), list("abcdef"))
    assert (same.p, same.difference.low, same.difference.high) == pytest.approx((1, -45.93, 45.93), rel=1e-3)


def test_intervals_cover_a_system_that_is_nearly_always_right() -> None:
    """Most samples of 25 clips have no wrong answer, or one."""
    generator = np.random.default_rng(4)
    drawn = [accuracy(generator.random((1, 25)) < 0.97, list(range(25))) for _ in range(1000)]
    assert sum(found.low <= 97 <= found.high for found in drawn) > 920


def test_seeds_that_agree_by_chance_do_not_make_a_result_certain() -> None:
    right = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]])
    found = accuracy(right, list("abcdef"))
    assert found.mean == 50
    assert found.high - found.low > 30
    generator = np.random.default_rng(8)
    held, told = 0, 0
    for _ in range(400):
        ours, theirs = generator.random((2, 2, 8)) < 0.5
        held += accuracy(ours, list(range(8))).low <= 50 <= accuracy(ours, list(range(8))).high
        told += compare(ours, theirs, list(range(8))).p < 1e-3
    assert held > 0.92 * 400
    assert not told


def test_intervals_depend_on_the_number_of_clips_not_questions() -> None:
    right = np.array([[1, 0] * 50])
    alone = accuracy(right, list(range(100)))
    together = accuracy(np.sort(right), [q // 10 for q in range(100)])
    assert together.high - together.low > 2.5 * (alone.high - alone.low)
    # A proportion's textbook interval: 1.984 is Student's quantile at 99 degrees of freedom.
    assert alone.high - 50 == pytest.approx(100 * 1.984 * np.sqrt(0.25 / 99), rel=1e-3)


def test_seeds_widen_the_interval_by_students_quantile() -> None:
    right = np.stack([np.arange(1000) % 10 < share for share in (4, 5, 6)])
    found = accuracy(right, [q // 10 for q in range(1000)])  # clips are all alike, seeds are not
    half = 4.3027 * 10 / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((50 - half, 50 + half), rel=1e-3)


def test_intervals_stay_within_what_is_possible() -> None:
    right = np.stack([np.zeros(40), np.ones(40), np.ones(40)])
    assert accuracy(right, list(range(40))).high == 100
    assert compare(right, np.zeros((1, 40)), list(range(40))).difference.high == 100


def test_one_clip_tells_nothing_about_others() -> None:
    found = accuracy(np.array([[1, 0], [1, 1]]), ["a", "a"])
    assert (found.mean, found.low, found.high) == (75, 0, 100)
    compared = compare(np.ones((1, 3)), np.zeros((1, 3)), ["a"] * 3)
    assert (compared.p, compared.verdict) == (1, "cannot be told apart")


def test_the_p_value_and_the_interval_agree() -> None:
    generator = np.random.default_rng(2)
    for points in np.linspace(0, 14, 30):
        experiment = MadeUp(2.0, 0.0, generator)
        found = compare(experiment.system(3, above=points), experiment.system(2), experiment.clips)
        assert (found.p < 0.05) == (found.verdict != "cannot be told apart")


def test_comparison_has_a_sign_and_finds_equal_systems_equal() -> None:
    experiment = MadeUp(1.0, 0.0, np.random.default_rng(0))
    better, base = experiment.system(3, above=20), experiment.system(3)
    found, swapped = (compare(*pair, experiment.clips) for pair in ((better, base), (base, better)))
    assert (found.verdict, swapped.verdict) == ("above", "below")
    assert swapped.difference.mean == pytest.approx(-found.difference.mean)
    assert swapped.p == found.p < 0.05
    same = compare(base, base, experiment.clips)
    assert (same.p, same.verdict) == (1, "cannot be told apart")


def test_questions_are_paired() -> None:
    """A system that is right wherever another is, and sometimes besides, is above it on far fewer questions."""
    generator = np.random.default_rng(1)
    clips = [q // 4 for q in range(400)]
    base = generator.random((1, 400)) < 0.5
    better = base | (generator.random((1, 400)) < 0.1)
    assert compare(better, base, clips).p < 0.01
    assert compare(np.roll(better, 200, axis=1), base, clips).p > 0.05


def test_the_needed_seeds_reach_the_stated_power() -> None:
    generator = np.random.default_rng(11)
    experiment = MadeUp(3.0, 0.0, generator)
    power = measure_power([experiment.system(20) for _ in range(3)], experiment.clips)
    assert power is not None
    seeds = power.seeds_needed(5.0)
    assert seeds is not None
    assert 5 <= seeds <= 14
    found = [
        compare(experiment.system(seeds, above=5.0), experiment.system(seeds), experiment.clips).verdict == "above"
        for _ in range(150)
    ]
    assert 0.68 <= np.mean(found) <= 0.92
    assert power.seeds_needed(3.0) > seeds  # type: ignore[operator]


def test_seed_by_clip_variance_is_not_counted_as_clip_variance() -> None:
    experiment = MadeUp(0.0, 30.0, np.random.default_rng(13))
    experiment.easy[:] = 0
    power = measure_power([experiment.system(3) for _ in range(4)], experiment.clips)
    assert power is not None
    # Seeds alone give each mean a variance of at least 30**2 / 80 clips / 3 seeds.
    assert power.clip_variance < 0.4 * 30**2 / CLIPS / 3


def test_more_seeds_do_not_make_up_for_too_few_clips() -> None:
    generator = np.random.default_rng(12)
    clips = list(range(50))
    # Each system has its own opinion on each clip, which all its seeds share.
    systems = [np.tile(generator.random((1, 50)) < 0.5, (3, 1)) for _ in range(2)]
    power = measure_power(systems, clips)
    assert power is not None
    assert power.seeds_needed(5.0) is None
    assert measure_power(systems[:1], clips) is None
    assert measure_power([system[:1] for system in systems], clips) is None
    alike = np.tile(np.array(systems[0], dtype=float)[:1], (2, 1))
    assert measure_power([alike, alike], clips) is None


def test_comparing_different_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the same questions"):
        compare(np.zeros((1, 2)), np.zeros((1, 3)), ["a", "b"])
    with pytest.raises(ValueError, match=r"expected \[seeds, 0\], not empty"):
        accuracy(np.zeros((1, 0)), [])
