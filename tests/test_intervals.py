"""Bootstrap intervals against distributions that can be written out."""

from itertools import product

import numpy as np
import pytest

from diagnostics.intervals import bootstrap_interval, crossed_interval


def seeded(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(0)


def test_quantiles_are_those_of_all_resamples() -> None:
    """Four values have 256 resamples; their quantiles are enumerated instead of drawn."""
    values = np.array([0.0, 1.0, 3.0, 10.0])
    every = [np.mean(drawn) for drawn in product(values, repeat=4)]
    for level in (0.5, 0.8):
        want = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
        found = bootstrap_interval(values, mean, seeded(0), level=level, resamples=20_000)
        assert np.allclose(found, want, atol=0.26), "one step of the enumerated distribution"


def test_strata_keep_their_sizes_and_whole_repetitions_are_drawn() -> None:
    values, strata = np.array([0.0, 0.0, 0.0, 6.0, 6.0]), np.array([0, 0, 0, 1, 1])
    low, high = bootstrap_interval(values, mean, seeded(1), strata=strata)
    assert (low, high) == pytest.approx((2.4, 2.4)), "nothing varies within a stratum"
    low, high = bootstrap_interval(values, mean, seeded(1))
    assert low < 2.4 < high
    # two columns that differ by a constant: their difference has no spread, each alone has
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


def test_crossed_intervals_see_runs_and_problems() -> None:
    runs, problems = np.arange(8.0)[:, None], np.arange(40.0)[None, :]
    for table, spread in (
        (runs + 0 * problems, np.var(runs) / 8),
        (0 * runs + problems, np.var(problems) / 40),
        (runs + problems, np.var(runs) / 8 + np.var(problems) / 40),
    ):
        low, high = crossed_interval(table, seeded(7), resamples=20_000)
        assert low < table.mean() < high
        assert (high - low) / (2 * 1.96) == pytest.approx(spread**0.5, rel=0.04)


def test_wrong_requests_name_the_number() -> None:
    for make, words in (
        (lambda: bootstrap_interval(np.ones(1), mean, seeded(0)), "holds 1 repetitions"),
        (lambda: bootstrap_interval(np.ones(0), mean, seeded(0)), "holds 0 repetitions"),
        (lambda: bootstrap_interval(np.ones(3), mean, seeded(0), level=1.0), r"level is 1\.0"),
        (
            lambda: bootstrap_interval(np.ones(3), mean, seeded(0), strata=np.array([0, 0, 1])),
            "holds 1 repetitions",
        ),
        (
            lambda: bootstrap_interval(np.ones(3), mean, seeded(0), strata=np.ones(2)),
            r"shape \(2,\), values hold 3",
        ),
        (lambda: crossed_interval(np.ones((0, 4)), seeded(0)), r"shape \(0, 4\)"),
        (lambda: crossed_interval(np.ones(4), seeded(0)), r"shape \(4,\)"),
        (lambda: crossed_interval(np.ones((2, 4)), seeded(0), level=0.0), r"level is 0\.0"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
