"""Rank correlation against scipy, and the area under the ROC curve against counting of pairs."""

import math

import numpy as np
import pytest
from scipy import stats

from opd.analysis.scout.scores import (
    auroc,
    average_ranks,
    method_averages,
    spearman,
    spearman_within,
)


def once(n: int) -> np.ndarray:
    """Weights of one copy of each of n runs."""
    return np.ones((1, n))


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_and_correlation_are_those_of_scipy(ties: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.normal(size=(2, 15))
        if ties:
            x, y = np.round(x), np.round(2 * y)
        assert average_ranks(x, once(15))[0] == pytest.approx(stats.rankdata(x))
        assert spearman(x, y, once(15))[0] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_correlation_within_methods_ignores_what_tells_methods_apart() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 30))
    method = np.repeat(["a", "b", "c"], [5, 10, 15])
    parts = [stats.spearmanr(x[method == m], y[method == m]).statistic for m in "abc"]
    expected = np.average(parts, weights=[5, 10, 15])
    assert spearman_within(x, y, method, once(30))[0] == pytest.approx(expected)
    shift = 100.0 * np.repeat([0, 1, 2], [5, 10, 15])
    assert spearman_within(x + shift, y + shift, method, once(30))[0] == pytest.approx(expected)
    constant_in_c = np.where(method == "c", 0.0, x)
    expected = np.average([*parts[:2], 0.0], weights=[5, 10, 15])
    assert spearman_within(constant_in_c, y, method, once(30))[0] == pytest.approx(expected)
    constant_gain = np.where(method == "c", 0.0, y)
    expected = np.average(parts[:2], weights=[5, 10])
    assert spearman_within(x, constant_gain, method, once(30))[0] == pytest.approx(expected)
    assert math.isnan(spearman_within(x, np.zeros(30), method, once(30))[0])


def test_area_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(2)
    for _ in range(10):
        score, positive = np.round(2 * generator.normal(size=12)), generator.random(12) < 0.4
        positive[:2] = [True, False]
        pairs = [
            float(a > b) + 0.5 * float(a == b) for a in score[positive] for b in score[~positive]
        ]
        assert auroc(score, positive, once(12))[0] == pytest.approx(np.mean(pairs))
        with_nan = np.append(score, [math.nan, math.nan])
        area = auroc(with_nan, np.append(positive, [True, False]), once(14))[0]
        assert area == pytest.approx(np.mean(pairs))
    assert math.isnan(auroc(score, np.ones(12, dtype=bool), once(12))[0])
    assert math.isnan(auroc(np.full(12, math.nan), positive, once(12))[0])


def test_scores_of_weighted_runs_are_those_of_their_copies() -> None:
    generator = np.random.default_rng(3)
    x, y = np.round(2 * generator.normal(size=(2, 24)))
    x[3], positive = math.nan, generator.random(24) < 0.3
    method = np.array(["a", "b", "c", "d"])[generator.integers(0, 4, 24)]
    weights = generator.integers(0, 4, (40, 24))
    weights[:, method == "d"] = generator.integers(0, 2, (40, int((method == "d").sum())))
    y[method == "c"] = np.where(generator.random(int((method == "c").sum())) < 0.7, 1.0, 0.0)
    areas, within = auroc(x, positive, weights), spearman_within(x, y, method, weights)
    num_counted = set()
    for w, area, rho in zip(weights, areas, within, strict=True):
        score, outcome, label, name = (np.repeat(v, w) for v in (x, y, positive, method))
        present = np.isfinite(score)
        score, outcome, label, name = (v[present] for v in (score, outcome, label, name))
        test = stats.mannwhitneyu(score[label], score[~label])
        assert area == pytest.approx(test.statistic / (label.sum() * (~label).sum()))
        parts, sizes = [], []
        for m in "abcd":
            rows = name == m
            if rows.sum() >= 4 and len(set(outcome[rows])) > 1:
                constant = len(set(score[rows])) == 1
                parts.append(
                    0.0 if constant else stats.spearmanr(score[rows], outcome[rows]).statistic
                )
                sizes.append(rows.sum())
        assert rho == pytest.approx(np.average(parts, weights=sizes))
        num_counted.add(len(parts))
    assert len(num_counted) > 1, "the test needs methods that do not count in some resamples"


def test_averages_of_methods_are_those_of_an_average_pair() -> None:
    """Additive gains with cells that are missing: the plain means have the other order."""
    effect_of_method, effect_of_pair = {"a": 0.3, "b": 0.1, "c": 0.2}, [0.4, -0.3, -0.1, 0.2]
    cells = [("a", 1), ("a", 2), ("b", 0), ("b", 3), ("b", 1), ("c", 0), ("c", 2), ("a", 1)]
    gain = np.array([effect_of_method[m] + effect_of_pair[p] for m, p in cells])
    method, pair = np.array([m for m, _ in cells]), np.array([p for _, p in cells])
    assert gain[method == "a"].mean() < gain[method == "b"].mean()
    expected = {m: e + sum(effect_of_pair) / 4 for m, e in effect_of_method.items()}
    assert method_averages(gain, method, pair) == pytest.approx(expected)


def test_averages_of_methods_on_the_same_pairs_are_means() -> None:
    gain = np.random.default_rng(0).normal(size=12)
    method, pair = np.repeat(["a", "b", "c"], 4), np.tile(np.arange(4), 3)
    expected = {m: gain[method == m].mean() for m in "abc"}
    assert method_averages(gain, method, pair) == pytest.approx(expected)
