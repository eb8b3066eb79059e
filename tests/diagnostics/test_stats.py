"""Confidence intervals against enumerated distributions, published values and simulations."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from diagnostics.stats import (
    bootstrap_interval,
    gain_interval,
    runs_interval,
    share_interval,
    unpaired_interval,
    wilson_interval,
)


def seeded(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(0)


def test_quantiles_are_those_of_all_resamples() -> None:
    """Four values have 256 resamples, so their quantiles can be enumerated."""
    values = np.array([0.0, 1.0, 3.0, 10.0])
    resample_means = [np.mean(resample) for resample in product(values, repeat=4)]
    for level in (0.5, 0.8):
        expected = np.quantile(resample_means, [(1 - level) / 2, (1 + level) / 2])
        interval = bootstrap_interval(values, mean, seeded(0), level=level, resamples=20_000)
        assert np.allclose(interval, expected, atol=0.26), "one step of the enumerated distribution"


def test_strata_keep_their_sizes_and_whole_repetitions_are_drawn() -> None:
    values, strata = np.array([0.0, 0.0, 0.0, 6.0, 6.0]), np.array([0, 0, 0, 1, 1])
    low, high = bootstrap_interval(values, mean, seeded(1), strata=strata)
    assert (low, high) == pytest.approx((2.4, 2.4)), "nothing varies within a stratum"
    low, high = bootstrap_interval(values, mean, seeded(1))
    assert low < 2.4 < high
    # two columns that differ by a constant: only their difference has no variance
    pair = seeded(2).normal(size=(12, 1)) + np.array([0.0, 1.0])
    low, high = bootstrap_interval(pair, mean, seeded(3))
    assert np.allclose(high[1] - high[0], 1)
    assert (high - low).min() > 0.5
    low, high = bootstrap_interval(pair, lambda x: mean(x[:, 1] - x[:, 0]), seeded(3))
    assert (low, high) == pytest.approx((1, 1))


def test_one_generator_one_interval() -> None:
    values = seeded(4).normal(size=30)
    first = bootstrap_interval(values, mean, seeded(5))
    assert first == bootstrap_interval(values, mean, seeded(5))
    assert first != bootstrap_interval(values, mean, seeded(6))


def test_one_answer_a_problem_has_the_published_intervals() -> None:
    """Wilson inverts the score test; Newcombe (1998), Bonett and Price (2012) recomputed."""
    for right, n in ((0, 9), (3, 10), (128, 128), (70, 256)):
        answers = np.arange(n) < right
        assert share_interval(answers) == pytest.approx(wilson_interval(right / n, n), abs=1e-12)
        for p in share_interval(answers):
            score = abs(right / n - p) / max(p * (1 - p) / n, 1e-300) ** 0.5
            assert score == pytest.approx(1.959964, rel=1e-6) or right / n == pytest.approx(p)
    # table II of Newcombe: 56 of 70 against 48 of 80
    low, high = unpaired_interval(np.arange(80) < 48, np.arange(70) < 56)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # 3 problems won, 1 lost, 4 alike: (4 - 2) / 10 -+ z sqrt((6 / 10 - 0.04) / 10)
    low, high = gain_interval(np.array([1, 1, 1, -1, 0, 0, 0, 0]))
    assert (low, high) == pytest.approx((0.2 - 0.463812, 0.2 + 0.463812), abs=1e-6)
    # nothing changed in 4 problems: 0 -+ z sqrt(2) / 6
    assert gain_interval(np.zeros(4)) == pytest.approx((-0.461968, 0.461968), abs=1e-6)


@pytest.mark.parametrize("problems", [1, 2, 4, 30])
def test_agreement_is_no_certainty(problems: int) -> None:
    """More samples and runs on the same problems are not more problems."""
    for right in (0.0, 1.0):
        single_run = share_interval(np.full(problems, right))
        assert single_run == pytest.approx(wilson_interval(right, problems))
        assert share_interval(np.full((3, problems), right)) == single_run
    no_change = gain_interval(np.zeros(problems))
    assert gain_interval(np.zeros((3, problems))) == no_change
    assert no_change[0] == -no_change[1] != 0
    for gain in (1.0, -1.0):
        low, high = gain_interval(np.full(problems, gain))
        assert gain in (low, high)
        assert high - low > 0.5 / problems
    low, high = unpaired_interval(np.zeros(problems), np.zeros(problems))
    assert low < 0 < high


def test_intervals_of_many_problems_and_runs_are_those_of_normal_theory() -> None:
    t = 2.364624  # of 7 degrees of freedom, 97.5 %
    runs, problems = np.arange(8.0)[:, None] / 60, np.arange(2000.0)[None, :] / 4000
    for table, spread, critical in (
        (0.2 + runs + 0 * problems, np.var(runs, ddof=1) / 8, t),
        (0.2 + 0 * runs + problems, np.var(problems) / 2000, 1.96),
    ):
        for interval in (share_interval, gain_interval):
            low, high = interval(table)
            assert low < table.mean() < high
            assert (high - low) / (2 * critical) == pytest.approx(spread**0.5, rel=0.05)
    varying_table = 0.2 + runs + problems
    parts = np.array([np.var(runs, ddof=1) / 8, np.var(problems) / 2000])
    low, high = gain_interval(varying_table)
    assert 2 * 1.96 < (high - low) / parts.sum() ** 0.5 < 2 * t * 1.01


def test_the_interval_of_runs_is_that_of_their_problems_and_means() -> None:
    """On runs with many problems each, as `gain_interval` of all problems."""
    generator = np.random.default_rng(0)
    table = np.clip(generator.normal(0.1, 0.3, (5, 4000)) + np.arange(5)[:, None] / 200, -1, 1)
    ends = np.array([gain_interval(row) for row in table])
    low, high = runs_interval(table.mean(1), ends[:, 0], ends[:, 1])
    expected = gain_interval(table)
    assert (low, high) == pytest.approx(expected, abs=2e-4)
    assert high - low > 2 * 1.96 * table.mean(1).std(ddof=1) / 5**0.5
    assert runs_interval(table.mean(1)[:1], ends[:1, 0], ends[:1, 1]) == tuple(ends[0])
    # equal means: only the problems are left, whose errors add up
    low, high = runs_interval(np.full(4, 0.5), np.full(4, 0.4), np.full(4, 0.6))
    assert (low, high) == pytest.approx((0.45, 0.55))


def sample_chances(p: float, spread: float, size: tuple[int, ...], generator: Any) -> np.ndarray:
    """Sample success rates with mean p: equal (spread 0), beta, or all 0 or 1 (spread 1)."""
    if spread in (0.0, 1.0) or p in (0.0, 1.0):
        return np.full(size, p) if spread == 0 else (generator.random(size) < p).astype(float)
    return generator.beta(p * (1 / spread - 1), (1 - p) * (1 / spread - 1), size)


def covered_by_wilson(p: float, n: int) -> float:
    """Return the exact coverage of Wilson's interval for n independent problems, by enumeration."""
    ends = [wilson_interval(k / n, n) for k in range(n + 1)]
    ways = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    return sum(way for way, (low, high) in zip(ways, ends, strict=True) if low <= p <= high)


@pytest.mark.parametrize("problems", [1, 2, 4, 20])
def test_intervals_cover_what_is_true(problems: int) -> None:
    """Simulated problems, samples and runs of known mean.

    Wilson's own coverage falls to about 0.83 at single values of p and is 0.95 on average; shares
    of clustered answers do not fall below it.
    """
    generator, repetitions = seeded(problems), 150
    share_coverages, gain_coverages = [], []
    for samples, runs, spread in ((1, 1, 0.0), (8, 1, 0.0), (8, 1, 0.5), (4, 3, 0.5), (8, 1, 1.0)):
        for before_mean, after_mean in (
            (0, 0),
            (0.02, 0.1),
            (0.1, 0.1),
            (0.5, 0.5),
            (0.2, 0.8),
            (1, 1),
        ):
            num_covered = np.zeros(2)
            for _ in range(repetitions):
                before_chances = sample_chances(before_mean, spread, (problems,), generator)
                after_chances = sample_chances(after_mean, spread, (problems,), generator)
                before_table = (
                    generator.binomial(samples, np.tile(before_chances, (runs, 1))) / samples
                )
                after_table = (
                    generator.binomial(samples, np.tile(after_chances, (runs, 1))) / samples
                )
                for i, (low, high), true in (
                    (0, share_interval(after_table), after_mean),
                    (1, gain_interval(after_table - before_table), after_mean - before_mean),
                ):
                    num_covered[i] += low - 1e-9 <= true <= high + 1e-9
            share_coverages.append(num_covered[0] / repetitions)
            gain_coverages.append(num_covered[1] / repetitions)
    lowest = min(covered_by_wilson(p, problems) for p in np.linspace(0.001, 0.999, 999))
    assert min(share_coverages) > lowest - 0.1, "three standard errors of the simulation"
    assert min(gain_coverages) > 0.87
    assert np.mean(share_coverages) > 0.93
    assert np.mean(gain_coverages) > 0.945


def test_intervals_of_runs_that_differ_cover_the_mean_of_runs() -> None:
    """Three runs whose mean gains vary by 0.1; the true value is the mean over all runs."""
    generator, inside = seeded(11), 0
    for _ in range(400):
        chance = np.clip(0.5 + generator.normal(0, 0.1, (3, 1)) + np.zeros((3, 200)), 0, 1)
        low, high = share_interval(generator.random((3, 200)) < chance)
        inside += low <= 0.5 <= high
    assert 0.91 < inside / 400 < 0.985


def test_wrong_requests_name_the_number() -> None:
    for make, pattern in (
        (lambda: bootstrap_interval(np.ones(1), mean, seeded(0)), "holds 1 repetitions"),
        (lambda: bootstrap_interval(np.ones(0), mean, seeded(0)), "holds 0 repetitions"),
        (lambda: bootstrap_interval(np.ones(3), mean, seeded(0), level=1.0), r"level is 1\.0"),
        (
            lambda: bootstrap_interval(np.ones(3), mean, seeded(0), strata=np.array([0, 0, 1])),
            "holds 1 repetitions",
        ),
        (
            lambda: bootstrap_interval(np.ones(3), mean, seeded(0), strata=np.ones(2)),
            r"shape \(2,\), but values holds 3",
        ),
        (lambda: share_interval(np.ones((0, 4))), r"shape \(0, 4\)"),
        (lambda: gain_interval(np.ones((2, 2, 4))), r"shape \(2, 2, 4\)"),
        (lambda: share_interval([0.5, -0.25]), r"1 of 2 values are outside \[0, 1\].* -0\.25"),
        (lambda: gain_interval([[0.5, -1.5]]), r"outside \[-1, 1\].* -1\.5"),
        (lambda: share_interval([0.5, float("nan")]), "the first is nan"),
    ):
        with pytest.raises(ValueError, match=pattern):
            make()
