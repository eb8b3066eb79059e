"""The forecasts against direct fits, conjugate formulas and finite differences; their coverage."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from opd.analysis.scout import forecast
from opd.analysis.scout.bank import FEATURES, Bank
from opd.analysis.scout.covariance import SHAPES, Scaling
from tests.helpers.records.scout_banks import START, synthetic_bank

EFFECTS = {"continuation_gain": 0.06, "log_reverse_kl": -0.05, "special_signal": -0.04}


def prior(shape: str, a: tuple, b: tuple) -> float:
    """Covariance of two runs (x, method, pair), written out."""
    (x, method, pair), (y, other_method, other_pair) = a, b
    k = {
        "none": 0.0,
        "linear": sum(u * v for u, v in zip(x, y, strict=True)) / len(x),
        "gaussian": math.exp(-sum((u - v) ** 2 for u, v in zip(x, y, strict=True)) / (2 * len(x))),
    }[shape]
    same_method = method == other_method
    return 100.0 + same_method + k + same_method * k + (pair == other_pair)


def gram(shape: str, rows: list[tuple], others: list[tuple]) -> np.ndarray:
    return np.array([[prior(shape, a, b) for b in others] for a in rows])


def runs(bank: Bank, x: np.ndarray) -> list[tuple]:
    return list(zip(x.tolist(), bank.method, bank.pair, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_gain_is_the_posterior_mean_and_residuals_are_those_of_refits(shape: str) -> None:
    bank = synthetic_bank(0, effects=EFFECTS, families=3, pairs=3, methods=2)
    bank.features[4, 3] = math.nan
    model = forecast.fit_gain(bank, bank.family, [shape])
    assert (model.shape, model.penalty in forecast.PENALTIES) == (shape, True)
    mean, scale = np.nanmean(bank.features, 0), np.nanstd(bank.features, 0)
    x = np.nan_to_num((bank.features - mean) / scale)
    query = synthetic_bank(1, effects=EFFECTS, families=1, pairs=2, methods=2)
    inside = np.clip(query.features, np.nanmin(bank.features, 0), np.nanmax(bank.features, 0))
    known_runs = runs(bank, x)
    new_runs = [(z, m, "new") for z, m, _ in runs(query, (inside - mean) / scale)]
    c = gram(shape, known_runs, known_runs) + model.penalty * np.eye(len(bank))
    expected = gram(shape, new_runs, known_runs) @ np.linalg.solve(c, bank.gain)
    gains, _, _ = forecast.forecast_gain(model, query.features, query.method, query.start)
    assert gains == pytest.approx(np.clip(expected, -START, 1 - START))
    average = [([0.0] * len(FEATURES), m, "new") for m in query.method]
    expected = gram(shape, average, known_runs) @ np.linalg.solve(c, bank.gain)
    assert forecast.average_pair_gain(model, query.method) == pytest.approx(expected)
    for pair in np.unique(bank.pair):
        rest, rows = np.flatnonzero(bank.pair != pair), np.flatnonzero(bank.pair == pair)
        others = [known_runs[i] for i in rest]
        weights = np.linalg.solve(c[np.ix_(rest, rest)], bank.gain[rest])
        refit = gram(shape, [known_runs[i] for i in rows], others) @ weights
        assert model.residuals[rows] == pytest.approx(bank.gain[rows] - refit)


def test_shape_and_penalty_have_the_least_error_on_groups_that_were_left_out() -> None:
    bank = synthetic_bank(2, effects=EFFECTS, families=3, pairs=3, methods=2)
    x = Scaling.of_features(bank.features).standardise(bank.features)
    errors = {}
    for shape in SHAPES:
        c = gram(shape, runs(bank, x), runs(bank, x))
        for penalty in forecast.PENALTIES:
            residuals = np.empty(len(bank))
            for family in np.unique(bank.family):
                rest, rows = np.flatnonzero(bank.family != family), bank.family == family
                noisy = c[np.ix_(rest, rest)] + penalty * np.eye(len(rest))
                fit = c[np.flatnonzero(rows)][:, rest] @ np.linalg.solve(noisy, bank.gain[rest])
                residuals[rows] = bank.gain[rows] - fit
            errors[shape, penalty] = float(np.square(residuals).mean())
    model = forecast.fit_gain(bank, bank.family)
    assert (model.shape, model.penalty) == min(errors, key=errors.__getitem__)


def test_quantile_counts_pairs_and_not_runs() -> None:
    generator = np.random.default_rng(3)
    pair = np.repeat(["a", "b", "c", "d", "e"], [1, 2, 5, 9, 3])
    values = generator.random(20)
    for level in (0.5, 0.7, 0.8):
        shares = [
            sum(np.mean(values[pair == g] <= v) for g in "abcde") / 6 for v in np.sort(values)
        ]
        expected = np.sort(values)[next(i for i, s in enumerate(shares) if s >= level - 1e-9)]
        assert forecast.pair_quantile(values, pair, level) == expected
    assert forecast.pair_quantile(values, pair, 0.9) == math.inf  # 5 / 6 is less


def test_a_method_with_many_pairs_has_its_own_interval() -> None:
    bank = synthetic_bank(4, effects=EFFECTS, families=5, pairs=5, methods=2)
    rows = bank.method == "method-1"
    noise = 0.2 * np.random.default_rng(0).normal(size=len(bank))
    bank = replace(bank, gain=bank.gain + np.where(rows, noise, 0.0))
    model = forecast.fit_gain(bank, bank.family)
    own = forecast.pair_quantile(np.abs(model.residuals[rows]), bank.pair[rows], forecast.LEVEL)
    pooled = forecast.pair_quantile(np.abs(model.residuals), bank.pair, forecast.LEVEL)
    assert own > pooled
    assert forecast.conformal_half_width(model, "method-1") == own
    few = bank.rows(~rows | np.isin(bank.family, ["family-0", "family-1", "family-2"]))
    model = forecast.fit_gain(few, few.family)
    pooled = forecast.pair_quantile(np.abs(model.residuals), few.pair, forecast.LEVEL)
    assert forecast.conformal_half_width(model, "method-1") == pooled


def test_intervals_of_new_pairs_have_the_nominal_coverage() -> None:
    """One new pair for each of many banks, so that outcomes are independent."""
    num_covered, num_banks = 0, 150
    for seed in range(num_banks):
        bank = synthetic_bank(seed, effects=EFFECTS, families=1, pairs=21, methods=2)
        new = bank.pair == "pair-0-20"
        known_runs, query = bank.rows(~new), bank.rows(np.flatnonzero(new)[:1])
        model = forecast.fit_gain(known_runs, known_runs.pair, ["linear"])
        _, low, high = forecast.forecast_gain(model, query.features, query.method, query.start)
        num_covered += int((low <= query.gain)[0] and (query.gain <= high)[0])
    assert stats.binomtest(num_covered, num_banks, forecast.LEVEL).pvalue > 0.01


def test_forecasts_and_intervals_stay_within_what_accuracy_allows() -> None:
    bank = synthetic_bank(5, effects={"topk_overlap": 0.5}, families=3, pairs=4, methods=2)
    model = forecast.fit_gain(bank, bank.family)
    features = np.zeros((2, len(FEATURES)))
    features[:, list(FEATURES).index("topk_overlap")] = [50.0, -50.0]
    start = np.array([0.9, 0.05])
    for values in forecast.forecast_gain(model, features, bank.method[:2], start):
        assert (-start <= values).all()
        assert (values <= 1 - start).all()


def collapse_loss(f: np.ndarray, c: np.ndarray, target: np.ndarray) -> float:
    """Negative log of likelihood times prior of the log-odds f."""
    return float(np.logaddexp(0, f).sum() - target @ f + 0.5 * f @ np.linalg.solve(c, f))


def test_collapse_is_at_the_mode_with_the_curvature_of_finite_differences() -> None:
    bank = synthetic_bank(6, effects=EFFECTS, families=3, pairs=2, methods=2, pair_noise=0.15)
    assert 2 <= bank.collapsed.sum() <= len(bank) - 2
    model = forecast.fit_collapse(bank)
    x = Scaling.of_features(bank.features).standardise(bank.features)
    c, target = gram("linear", runs(bank, x), runs(bank, x)), bank.collapsed.astype(float)
    mode, n, h = c @ model.gradient, len(bank), 1e-3
    steps = h * np.eye(n)
    gradient = [
        (collapse_loss(mode + d, c, target) - collapse_loss(mode - d, c, target)) / (2 * h)
        for d in steps
    ]
    assert gradient == pytest.approx(np.zeros(n), abs=1e-4)
    hessian = np.array(
        [
            [
                collapse_loss(mode + a + b, c, target)
                - collapse_loss(mode + a - b, c, target)
                - collapse_loss(mode - a + b, c, target)
                + collapse_loss(mode - a - b, c, target)
                for b in steps
            ]
            for a in steps
        ]
    ) / (4 * h * h)
    query = bank.rows(np.array([0, 3]))
    new_runs = [(z, m, "new") for z, m, _ in runs(query, x[[0, 3]])]
    k = gram("linear", new_runs, runs(bank, x))
    transfer = k @ np.linalg.inv(c)
    covariance = (
        gram("linear", new_runs, new_runs).diagonal()
        - (transfer * k).sum(1)
        + (transfer @ np.linalg.inv(hessian) * transfer).sum(1)
    )
    log_odds, spread = k @ model.gradient, 1.644854 * np.sqrt(covariance)
    values = forecast.forecast_collapse(model, query.features, query.method)
    assert values[1] == pytest.approx(1 / (1 + np.exp(spread - log_odds)), abs=1e-4)
    assert values[2] == pytest.approx(1 / (1 + np.exp(-spread - log_odds)), abs=1e-4)
    mean = log_odds / np.sqrt(1 + math.pi * covariance / 8)
    assert values[0] == pytest.approx(1 / (1 + np.exp(-mean)), abs=1e-4)


def test_collapse_of_a_bank_without_collapses_is_unlikely_and_finite() -> None:
    bank = synthetic_bank(7, effects={}, families=3, pairs=3, methods=2)
    assert not bank.collapsed.any()
    model = forecast.fit_collapse(bank)
    probability, low, high = forecast.forecast_collapse(model, bank.features, bank.method)
    assert (low > 0).all()
    assert (low < probability).all()
    assert (probability < 0.2).all()
    assert (probability < high).all()
