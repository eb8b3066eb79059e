"""Test of the forecasts on pairs, or families of regimes, that they were not made from.

Every pair (or family) is left out in turn, together with all pairs of its seed, which may share
its models; everything is fitted again without them, the choice of the covariance and its penalty
included; and its runs are forecast. The scores are set beside single
predictors of published work on the same runs, which are given their best sign.

Shapes: n runs, p pairs, r resamples.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from diagnostics.errors import InvalidInput
from opd.analysis.scout.bank import FEATURES, PREDICTORS, Array, Bank
from opd.analysis.scout.forecast import (
    average_pair_gain,
    fit_collapse,
    fit_gain,
    forecast_collapse,
    forecast_gain,
)
from opd.analysis.scout.scores import auroc, method_averages, spearman_within

FORECAST = "forecast"
AUROC_LEAD = "auroc lead"
RESAMPLES = 200
"""Bootstrap samples of pairs."""
MIN_FAMILIES = 3
"""Fewest families and seeds of a bank that is tested."""
MIN_REMAINING = 5
"""Fewest pairs from which others are forecast; runs with fewer are not part of the test."""

Interval = tuple[float, float, float]
"""A value and the ends of its 95 % interval over pairs."""


@dataclass(frozen=True, eq=False)
class LeftOutForecasts:
    """Forecasts of every run of a bank by models made without its pair or family, (n,) each."""

    gain: Array
    gain_low: Array
    gain_high: Array
    feature_effect: Array
    """Forecast gain minus that of the same model and method for a pair with mean features. Means
    that leave a run out are lower for the runs that gained more, which would pass for the opposite
    of skill."""
    method_average: Array
    """Gain of the method on an average other pair; mean of all other runs where it has none."""
    collapse: Array
    """Probability."""

    def rows(self, index: Array) -> "LeftOutForecasts":
        """Return the forecasts of the selected runs; a bool mask or integers."""
        return LeftOutForecasts(**{name: column[index] for name, column in vars(self).items()})


@dataclass(frozen=True)
class Validation:
    """Scores of the forecasts with each pair, or each family, left out."""

    unit: str
    num_runs: int
    num_pairs: int
    num_families: int
    num_collapsed_pairs: int
    """Pairs with a run that collapsed."""
    spearman: Mapping[str, Interval]
    """Predictor -> rank correlation with the gain within methods; of the forecast, that of its
    feature effect."""
    spearman_lead: Interval
    """The forecast's correlation minus that of the best single predictor."""
    auroc: Mapping[str, Interval]
    """Predictor -> area under the ROC curve of a collapse."""
    auroc_lead: Interval
    """The forecast's area minus that of the best single predictor."""
    coverage: Interval
    """Share of runs in the interval of their gain, nominally `forecast.LEVEL`."""
    width: float
    """Mean width of these intervals."""
    error: Interval
    """Mean absolute error of the forecast gain."""
    error_lead: Interval
    """Mean absolute error of the method's average gain minus that of the forecast."""
    regret: Interval
    """Mean over pairs of the best method's gain minus that of the method with the best forecast."""
    average_regret: Interval
    """The same of the method with the best average gain in other pairs."""


def leave_out(bank: Bank, unit: str) -> LeftOutForecasts:
    """Forecast each pair or family from the others.

    Args:
        bank: The runs.
        unit: "pair" or "family".

    Returns:
        The forecasts; NaN for runs with fewer than MIN_REMAINING pairs to be forecast from.
    """
    columns = {name: np.full(len(bank), math.nan) for name in LeftOutForecasts.__annotations__}
    for is_query, is_known in splits(bank, unit):
        if len(np.unique(bank.pair[is_known])) < MIN_REMAINING:
            continue
        rows, others, query = np.flatnonzero(is_query), bank.rows(is_known), bank.rows(is_query)
        model = fit_gain(others, others.seed if unit == "pair" else others.family)
        gains = forecast_gain(model, query.features, query.method, query.start)
        columns["gain"][rows], columns["gain_low"][rows], columns["gain_high"][rows] = gains
        columns["feature_effect"][rows] = gains[0] - average_pair_gain(model, query.method)
        columns["collapse"][rows] = forecast_collapse(
            fit_collapse(others), query.features, query.method
        )[0]
        averages = method_averages(others.gain, others.method, others.pair)
        unknown = float(others.gain.mean())
        columns["method_average"][rows] = [averages.get(str(x), unknown) for x in query.method]
    return LeftOutForecasts(**columns)


def splits(bank: Bank, unit: str) -> Iterator[tuple[Array, Array]]:
    """Split a bank into runs that are forecast and runs from which they are forecast.

    Args:
        bank: The runs.
        unit: "pair": the others have another seed; "family": another seed and another family.

    Yields:
        Two (n,) bool masks. Every run is forecast once.
    """
    for seed in np.unique(bank.seed):
        is_seed = bank.seed == seed
        if unit == "pair":
            yield is_seed, ~is_seed
            continue
        for family in np.unique(bank.family[is_seed]):
            is_family = bank.family == family
            yield is_seed & is_family, ~is_seed & ~is_family


def is_testable(bank: Bank, unit: str) -> Array:
    """Return which runs can be forecast from MIN_REMAINING pairs or more.

    Args:
        bank: The runs.
        unit: "pair" or "family".

    Returns:
        (n,) bool.
    """
    testable = np.zeros(len(bank), dtype=bool)
    for is_query, is_known in splits(bank, unit):
        testable[is_query] = len(np.unique(bank.pair[is_known])) >= MIN_REMAINING
    return testable


def validate(bank: Bank, unit: str, seed: int = 0, resamples: int = RESAMPLES) -> Validation:
    """Score the forecasts of runs whose pair or family was left out.

    Args:
        bank: The runs.
        unit: "pair" or "family".
        seed: Seed of the bootstrap over pairs.
        resamples: Bootstrap samples.

    Returns:
        The scores.

    Raises:
        InvalidInput: Too few seeds, pairs or families.
    """
    for name in dict.fromkeys(("seed", unit)):
        if (num_groups := len(np.unique(getattr(bank, name)))) < MIN_FAMILIES:
            raise InvalidInput(
                f"the bank has {num_groups} different values of {name}; to leave out each in turn, "
                f"{MIN_FAMILIES} are needed"
            )
    testable = is_testable(bank, unit)
    if not testable.any():
        raise InvalidInput(
            f"without the {unit} and the seed of a run fewer than {MIN_REMAINING} pairs remain, "
            "for every run; record further seeds in other families"
        )
    forecasts = leave_out(bank, unit).rows(testable)
    bank = bank.rows(testable)
    signs = best_signs(bank)
    num_pairs = len(np.unique(bank.pair))
    values = all_scores(bank, forecasts, signs, np.ones((1, num_pairs)))
    drawn_pairs = np.random.default_rng(seed).integers(0, num_pairs, size=(resamples, num_pairs))
    # a pair that is drawn twice is two pairs
    copies = np.stack([np.bincount(pairs, minlength=num_pairs) for pairs in drawn_pairs])
    intervals = {}
    for name, resampled in all_scores(bank, forecasts, signs, copies).items():
        # without a collapse, or with nothing else, an order of runs tells nothing
        chance = 0.5 if name.startswith("auroc ") and name != AUROC_LEAD else 0.0
        low, high = np.quantile(np.where(np.isnan(resampled), chance, resampled), (0.025, 0.975))
        intervals[name] = (float(values[name][0]), float(low), float(high))
    names = [FORECAST, *PREDICTORS]
    return Validation(
        unit=unit,
        num_runs=len(bank),
        num_pairs=num_pairs,
        num_families=len(np.unique(bank.family)),
        num_collapsed_pairs=len(np.unique(bank.pair[bank.collapsed])),
        spearman={name: intervals[f"spearman {name}"] for name in names},
        spearman_lead=intervals["spearman lead"],
        auroc={name: intervals[f"auroc {name}"] for name in names},
        auroc_lead=intervals[AUROC_LEAD],
        coverage=intervals["coverage"],
        width=float(np.mean(forecasts.gain_high - forecasts.gain_low)),
        error=intervals["error"],
        error_lead=intervals["error lead"],
        regret=intervals["regret"],
        average_regret=intervals["average regret"],
    )


@dataclass(frozen=True)
class Signs:
    """1 or -1 for each single predictor: the sign with which it is best on the whole bank."""

    gain: Mapping[str, float]
    collapse: Mapping[str, float]


def best_signs(bank: Bank) -> Signs:
    """Return the signs of the single predictors."""
    columns = {name: _predictor(bank, name) for name in PREDICTORS}
    once = np.ones((1, len(bank)))
    return Signs(
        {
            name: -1.0 if spearman_within(column, bank.gain, bank.method, once)[0] < 0 else 1.0
            for name, column in columns.items()
        },
        {
            name: -1.0 if auroc(column, bank.collapsed, once)[0] < 0.5 else 1.0
            for name, column in columns.items()
        },
    )


def _predictor(bank: Bank, name: str) -> Array:
    column: Array = bank.features[:, list(FEATURES).index(PREDICTORS[name])]
    return column


def all_scores(
    bank: Bank, forecasts: LeftOutForecasts, signs: Signs, copies: Array
) -> dict[str, Array]:
    """Return the scores of resamples of pairs; a pair is drawn with all of its runs.

    Args:
        bank: The runs.
        forecasts: Their forecasts.
        signs: Signs of the single predictors.
        copies: (r, p) how often each pair was drawn, in the order of their sorted ids.

    Returns:
        Scores by name, (r,) each; NaN where one is not defined.
    """
    pair = np.unique(bank.pair, return_inverse=True)[1]
    method, gain, collapsed, weights = bank.method, bank.gain, bank.collapsed, copies[:, pair]
    spearmans = {FORECAST: spearman_within(forecasts.feature_effect, gain, method, weights)}
    areas = {FORECAST: auroc(forecasts.collapse, collapsed, weights)}
    for name in PREDICTORS:
        column = _predictor(bank, name)
        spearmans[name] = spearman_within(signs.gain[name] * column, gain, method, weights)
        areas[name] = auroc(signs.collapse[name] * column, collapsed, weights)
    is_covered = (forecasts.gain_low <= gain) & (gain <= forecasts.gain_high)
    error = _weighted_mean(np.abs(forecasts.gain - gain), weights)
    average_error = _weighted_mean(np.abs(forecasts.method_average - gain), weights)
    regret = pair_regrets(forecasts.gain, gain, method, pair)
    average_regret = pair_regrets(forecasts.method_average, gain, method, pair)
    return {
        **{f"spearman {name}": value for name, value in spearmans.items()},
        "spearman lead": _lead(spearmans),
        **{f"auroc {name}": value for name, value in areas.items()},
        AUROC_LEAD: _lead(areas),
        "coverage": _weighted_mean(is_covered, weights),
        "error": error,
        "error lead": average_error - error,
        "regret": _weighted_mean(regret, copies),
        "average regret": _weighted_mean(average_regret, copies),
    }


def _lead(values: Mapping[str, Array]) -> Array:
    """Return the forecast's score minus the best single predictor's."""
    singles = [value for name, value in values.items() if name != FORECAST]
    lead: Array = values[FORECAST] - np.max(singles, axis=0)
    return lead


def _weighted_mean(values: Array, weights: Array) -> Array:
    """Return (r,) means of (n,) values with (r, n) weights; NaN is left out."""
    present = np.isfinite(values)
    total, count = weights @ np.where(present, values, 0.0), weights @ present
    return np.divide(total, count, out=np.full(len(weights), np.nan), where=count > 0)


def pair_regrets(forecast: Array, gain: Array, method: Array, pair: Array) -> Array:
    """Return the best method's gain minus that of the method that is taken, for each pair.

    Of each pair, the method with the highest mean forecast is taken; gains of a method are averaged
    over its runs.

    Args:
        forecast: (n,) forecast gains.
        gain: (n,) gains.
        method: (n,) methods.
        pair: (n,) pairs.

    Returns:
        (p,) regrets, in the order of the sorted pairs; NaN for a pair with one method.
    """
    regrets = []
    for label in np.unique(pair):
        rows = pair == label
        names = np.unique(method[rows])
        by_method = [rows & (method == name) for name in names]
        gains = np.array([gain[index].mean() for index in by_method])
        forecasts = np.array([forecast[index].mean() for index in by_method])
        regret = float(gains.max() - gains[forecasts.argmax()])
        regrets.append(regret if len(names) > 1 else math.nan)
    return np.array(regrets)
