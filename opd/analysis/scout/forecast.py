"""Forecast of gain and of collapse for a method on a pair, from a bank of runs.

Both are Gaussian-process models with one prior covariance of two runs (`covariance.py`): of what
their methods, features and pairs have in common. That of features, k, is linear, Gaussian or 0 (no
features: each method's average). The gain is kernel ridge regression; k and its penalty are those
with the least squared error when a group of runs is left out. The collapse is kernel logistic
regression with a linear k, by Laplace's approximation. A new pair shares nothing with the pairs of
the bank but method and features. (Rasmussen and Williams 2006, chapters 2, 3 and 5.)

Shapes: n runs, d features, q queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd.analysis.scout.bank import Array, Bank
from opd.analysis.scout.covariance import (
    MEAN_VARIANCE,
    SHAPES,
    BankInverse,
    Scaling,
    bank_covariance,
    covariance,
    noisy_inverse,
)

PENALTIES = (0.3, 1.0, 3.0)
"""Candidates for the variance of a run's noise, in units of the prior variance of an effect."""
COLLAPSE_VARIANCE = 1.0
"""Prior variance of an effect on the log-odds of a collapse."""
LEVEL = 0.9
"""Coverage of intervals."""
NORMAL_QUANTILE = 1.644854
"""95 % quantile of the standard normal distribution."""
MIN_OWN_PAIRS = 19
"""Fewest pairs of a method whose interval is from its own residuals."""
NEWTON_STEPS = 30


@dataclass(frozen=True, eq=False)
class GainModel:
    """A forecast of gains."""

    bank: Bank
    """The runs that it is made from."""
    scaling: Scaling
    shape: str
    """Covariance of features that was chosen, one of SHAPES."""
    penalty: float
    """Penalty that was chosen."""
    weights: Array
    """(n,) weights of the covariances."""
    residuals: Array
    """(n,) gain minus the forecast without the runs of its seed."""


def fit_gain(bank: Bank, group: Array, shapes: Sequence[str] = SHAPES) -> GainModel:
    """Fit the forecast of gains, with shape and penalty by leaving out groups.

    Args:
        bank: The runs.
        group: (n,) labels of the groups: pairs or families.
        shapes: Candidates for the covariance of features, of SHAPES.

    Returns:
        The model.
    """
    scaling = Scaling.of_features(bank.features)
    x, ones = scaling.standardise(bank.features), np.ones(len(bank))
    group_index = np.unique(group, return_inverse=True)[1]  # numbers sort faster than text
    best: tuple[float, str, float, BankInverse] | None = None
    for shape in shapes:
        c = bank_covariance(shape, x, bank)
        for penalty in PENALTIES:
            inverse = noisy_inverse(c, penalty, ones)
            error = float(np.square(left_out_residuals(inverse, bank.gain, group_index)).mean())
            if best is None or error < best[0]:
                best = error, shape, penalty, inverse
    assert best is not None
    _, shape, penalty, inverse = best
    residuals = left_out_residuals(inverse, bank.gain, bank.seed)
    return GainModel(bank, scaling, shape, penalty, inverse.times(bank.gain), residuals)


def left_out_residuals(inverse: BankInverse, target: Array, group: Array) -> Array:
    """Return each target minus its prediction from the runs of other groups.

    With C the covariance of the targets: of a group g, [C^-1]_gg^-1 [C^-1 y]_g, exactly what fits
    without the group would give. (Rasmussen and Williams 2006, equation 5.12, for blocks.)

    Args:
        inverse: C^-1, of n runs.
        target: (n,) y.
        group: (n,) labels.

    Returns:
        (n,) residuals.
    """
    residuals, weights = np.empty_like(target), inverse.times(target)
    _, index, counts = np.unique(group, return_inverse=True, return_counts=True)
    order, ends = np.argsort(index, kind="stable"), np.cumsum(counts)
    for size in np.unique(counts):  # the groups of one size together
        first = (ends - counts)[counts == size]
        rows = order[first[:, None] + np.arange(size)]
        solved = np.linalg.solve(inverse.blocks(rows), weights[rows][:, :, None])
        residuals[rows] = solved[:, :, 0]
    return residuals


def forecast_gain(
    model: GainModel, features: Array, method: Array, start: Array
) -> tuple[Array, Array, Array]:
    """Forecast the gain of runs on new pairs, with intervals.

    The interval is the forecast plus and minus the LEVEL quantile of the absolute residuals without
    the run's own pair, in which every pair counts equally, however many runs it has, and the new
    pair as one more of unknown residual; residuals of the method alone where it has
    MIN_OWN_PAIRS pairs. (Conformal prediction for hierarchical data: Lee, Barber and Willett 2023,
    arXiv 2306.06342; residuals of the jackknife.) Forecast and interval are limited to what the
    student's accuracy allows.

    Args:
        model: The model.
        features: (q, d) features.
        method: (q,) methods.
        start: (q,) accuracies of the students.

    Returns:
        Forecast, lower and upper end, (q,) each.
    """
    x = model.scaling.standardise(features)
    bank_x = model.scaling.standardise(model.bank.features)
    k = covariance(model.shape, x, method, bank_x, model.bank.method)
    lowest, highest = -start, 1 - start
    forecast = np.clip(k @ model.weights, lowest, highest)
    half_widths = {str(name): conformal_half_width(model, str(name)) for name in np.unique(method)}
    width = np.array([half_widths[str(name)] for name in method])
    low, high = (
        np.clip(forecast - width, lowest, highest),
        np.clip(forecast + width, lowest, highest),
    )
    return forecast, low, high


def average_pair_gain(model: GainModel, method: Array) -> Array:
    """Return the (q,) forecasts of methods on a pair with the mean of all features, unlimited."""
    x = model.scaling.standardise(model.bank.features)
    mean = np.zeros((len(method), x.shape[1]))
    return covariance(model.shape, mean, method, x, model.bank.method) @ model.weights


def conformal_half_width(model: GainModel, method: str) -> float:
    """Return the half-width of a method's intervals; infinite if there are too few pairs."""
    rows = model.bank.method == method
    if len(np.unique(model.bank.pair[rows])) < MIN_OWN_PAIRS:
        rows = np.ones_like(rows)
    return pair_quantile(np.abs(model.residuals[rows]), model.bank.pair[rows], LEVEL)


def pair_quantile(values: Array, pair: Array, level: float) -> float:
    """Return the least value v with sum_g mean_{i in g} 1[values_i <= v] >= level (G + 1).

    Args:
        values: (n,) values.
        pair: (n,) pairs, G different ones.
        level: Coverage.

    Returns:
        The quantile; infinite if G / (G + 1) < level.
    """
    _, index, counts = np.unique(pair, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    covered = np.cumsum(1 / counts[index[order]])
    reached = np.flatnonzero(covered >= level * (len(counts) + 1) - 1e-9)
    return float(values[order[reached[0]]]) if len(reached) else math.inf


@dataclass(frozen=True, eq=False)
class CollapseModel:
    """A forecast of collapses."""

    bank: Bank
    """The runs that it is made from."""
    scaling: Scaling
    gradient: Array
    """(n,) gradient of the log-likelihood at the mode: collapsed minus its probability."""
    root: Array
    """(n,) square root of the curvature W of the log-likelihood."""
    inverse: BankInverse
    """(I + W^1/2 K W^1/2)^-1."""


def fit_collapse(bank: Bank) -> CollapseModel:
    """Fit the log-odds of a collapse by Newton's method (Rasmussen and Williams, algorithm 3.1).

    Args:
        bank: The runs.

    Returns:
        The model.
    """
    scaling = Scaling.of_features(bank.features)
    c = bank_covariance("linear", scaling.standardise(bank.features), bank)
    k = COLLAPSE_VARIANCE * c.dense()
    target, f = bank.collapsed.astype(np.float64), np.zeros(len(bank))
    for _ in range(NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-f))
        root = np.sqrt(probability * (1 - probability))
        inverse = noisy_inverse(c, 1.0, math.sqrt(COLLAPSE_VARIANCE) * root)
        b = root**2 * f + target - probability
        a = b - root * inverse.times(root * (k @ b))
        previous, f = f, k @ a
        if np.abs(f - previous).max() < 1e-8:
            break
    probability = 1 / (1 + np.exp(-f))
    root = np.sqrt(probability * (1 - probability))
    inverse = noisy_inverse(c, 1.0, math.sqrt(COLLAPSE_VARIANCE) * root)
    return CollapseModel(bank, scaling, target - probability, root, inverse)


def forecast_collapse(
    model: CollapseModel, features: Array, method: Array
) -> tuple[Array, Array, Array]:
    """Forecast the probability of a collapse of runs on new pairs, with LEVEL intervals.

    The interval is that of the log-odds at a new pair, which include what is particular to the
    pair; the probability is its mean (MacKay's approximation).

    Args:
        model: The model.
        features: (q, d) features.
        method: (q,) methods.

    Returns:
        Probability, lower and upper end, (q,) each.
    """
    x = model.scaling.standardise(features)
    bank_x = model.scaling.standardise(model.bank.features)
    k = COLLAPSE_VARIANCE * covariance("linear", x, method, bank_x, model.bank.method)
    log_odds = k @ model.gradient
    prior_variance = COLLAPSE_VARIANCE * (
        MEAN_VARIANCE + 2 + 2 * np.square(x).sum(1) / max(1, x.shape[1])
    )
    weighted = (k * model.root).T
    explained = (weighted * model.inverse.times(weighted)).sum(0)
    variance = np.maximum(prior_variance - explained, 0.0)
    spread = NORMAL_QUANTILE * np.sqrt(variance)
    mean = log_odds / np.sqrt(1 + math.pi * variance / 8)
    probability, low, high = (
        1 / (1 + np.exp(-z)) for z in (mean, log_odds - spread, log_odds + spread)
    )
    return probability, low, high
