"""Rank correlation against scipy, and the area under the ROC curve against counting of pairs."""

import math

import numpy as np
import pytest
from scipy import stats

from opd.analysis.scout.scores import auroc, average_ranks, spearman, spearman_within


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_and_correlation_are_those_of_scipy(ties: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.normal(size=(2, 15))
        if ties:
            x, y = np.round(x), np.round(2 * y)
        assert average_ranks(x) == pytest.approx(stats.rankdata(x))
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_correlation_within_methods_ignores_what_tells_methods_apart() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 30))
    method = np.repeat(["a", "b", "c"], [5, 10, 15])
    parts = [stats.spearmanr(x[method == m], y[method == m]).statistic for m in "abc"]
    expected = np.average(parts, weights=[5, 10, 15])
    assert spearman_within(x, y, method) == pytest.approx(expected)
    shift = 100.0 * np.repeat([0, 1, 2], [5, 10, 15])
    assert spearman_within(x + shift, y + shift, method) == pytest.approx(expected)
    constant_in_c = np.where(method == "c", 0.0, x)
    expected = np.average([*parts[:2], 0.0], weights=[5, 10, 15])
    assert spearman_within(constant_in_c, y, method) == pytest.approx(expected)
    constant_gain = np.where(method == "c", 0.0, y)
    expected = np.average(parts[:2], weights=[5, 10])
    assert spearman_within(x, constant_gain, method) == pytest.approx(expected)
    assert math.isnan(spearman_within(x, np.zeros(30), method))


def test_area_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(2)
    for _ in range(10):
        score, positive = np.round(2 * generator.normal(size=12)), generator.random(12) < 0.4
        positive[:2] = [True, False]
        pairs = [
            float(a > b) + 0.5 * float(a == b) for a in score[positive] for b in score[~positive]
        ]
        assert auroc(score, positive) == pytest.approx(np.mean(pairs))
        with_nan = np.append(score, [math.nan, math.nan])
        assert auroc(with_nan, np.append(positive, [True, False])) == pytest.approx(np.mean(pairs))
    assert math.isnan(auroc(score, np.ones(12, dtype=bool)))
