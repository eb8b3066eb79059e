"""Forecast of gain and of collapse for a method on a pair, from a bank of runs.

Both are Gaussian-process models with one prior covariance of two runs,

    C = C0 + 1[m = m'] + k(x, x') + 1[m = m'] k(x, x') + 1[g = g'],

with methods m, features x and pairs g: a mean, an average of each method, what features do to all
methods and to one, and what else the runs of a pair share. k is linear, Gaussian or 0 (no features:
each method's average). The gain is kernel ridge regression; k and its penalty are those with the
least squared error when a group of runs is left out. The collapse is kernel logistic regression
with a linear k, by Laplace's approximation. A new pair shares nothing with the pairs of the bank
but method and features. (Rasmussen and Williams 2006, chapters 2, 3 and 5.)

Shapes: n runs, d features, q queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd.analysis.scout.bank import Array, Bank

SHAPES = ("none", "linear", "gaussian")
"""Shapes of the covariance of features."""
PENALTIES = (0.3, 1.0, 3.0)
"""Candidates for the variance of a run's noise, in units of the prior variance of an effect."""
MEAN_VARIANCE = 100.0
"""Prior variance C0 of the mean over all runs: it is hardly shrunk."""
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
class Scaling:
    """Standardisation of features, from the runs that a model is made from."""

    mean: Array
    """(d,)."""
    scale: Array
    """(d,)."""
    low: Array
    """(d,) smallest values."""
    high: Array
    """(d,) largest values."""

    @classmethod
    def of_features(cls, features: Array) -> "Scaling":
        """Return the scaling of (n, d) features; NaN is left out of all."""
        present = np.isfinite(features)
        values = np.where(present, features, 0.0)
        count = present.sum(0).clip(min=1)
        mean = values.sum(0) / count
        variance = (np.square(values - mean) * present).sum(0) / count
        return cls(
            mean,
            np.where(variance > 1e-12, np.sqrt(variance), 1.0),
            np.where(present, features, np.inf).min(0),
            np.where(present, features, -np.inf).max(0),
        )

    def standardise(self, features: Array) -> Array:
        """Return (q, d) standardised features, held at the ends of the range; 0 for NaN."""
        clipped = np.clip(features, self.low, self.high)
        return np.where(np.isfinite(features), (clipped - self.mean) / self.scale, 0.0)


def covariance(shape: str, x: Array, method: Array, other_x: Array, other_method: Array) -> Array:
    """Return the (q, n) prior covariances of runs of different pairs.

    Args:
        shape: One of SHAPES.
        x: (q, d) standardised features.
        method: (q,) methods.
        other_x: (n, d).
        other_method: (n,).

    Returns:
        The covariances.
    """
    same_method = (method[:, None] == other_method[None]).astype(np.float64)
    dimensions = max(1, x.shape[1])
    if shape == "none":
        k = np.zeros((len(x), len(other_x)))
    elif shape == "linear":
        k = x @ other_x.T / dimensions
    else:
        squares = np.square(x).sum(1)[:, None] + np.square(other_x).sum(1) - 2 * x @ other_x.T
        k = np.exp(-np.maximum(squares, 0.0) / (2 * dimensions))
    return MEAN_VARIANCE + same_method + k + same_method * k


def within_bank(shape: str, x: Array, bank: Bank) -> Array:
    """Return the (n, n) prior covariances of the runs of a bank, with what pairs share."""
    same_pair = bank.pair[:, None] == bank.pair[None]
    return covariance(shape, x, bank.method, x, bank.method) + same_pair


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
    """(n,) gain minus the forecast without the run's group."""


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
    x, candidates = scaling.standardise(bank.features), []
    for shape in shapes:
        k = within_bank(shape, x, bank)
        for penalty in PENALTIES:
            inverse = np.linalg.inv(k + penalty * np.eye(len(bank)))
            residuals = left_out_residuals(inverse, bank.gain, group)
            candidates.append((float(np.square(residuals).mean()), shape, penalty))
    _, shape, penalty = min(candidates, key=lambda candidate: candidate[0])
    inverse = np.linalg.inv(within_bank(shape, x, bank) + penalty * np.eye(len(bank)))
    pair_residuals = left_out_residuals(inverse, bank.gain, bank.pair)
    return GainModel(bank, scaling, shape, penalty, inverse @ bank.gain, pair_residuals)


def left_out_residuals(inverse: Array, target: Array, group: Array) -> Array:
    """Return each target minus its prediction from the runs of other groups.

    With C the covariance of the targets: of a group g, [C^-1]_gg^-1 [C^-1 y]_g, exactly what fits
    without the group would give. (Rasmussen and Williams 2006, equation 5.12, for blocks.)

    Args:
        inverse: (n, n) C^-1.
        target: (n,) y.
        group: (n,) labels.

    Returns:
        (n,) residuals.
    """
    residuals, weights = np.empty_like(target), inverse @ target
    for label in np.unique(group):
        rows = np.flatnonzero(group == label)
        residuals[rows] = np.linalg.solve(inverse[np.ix_(rows, rows)], weights[rows])
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
    noise_inverse: Array
    """(n, n) (K + W^-1)^-1, with W the curvature of the log-likelihood."""


def fit_collapse(bank: Bank) -> CollapseModel:
    """Fit the log-odds of a collapse by Newton's method (Rasmussen and Williams, algorithm 3.1).

    Args:
        bank: The runs.

    Returns:
        The model.
    """
    scaling = Scaling.of_features(bank.features)
    k = COLLAPSE_VARIANCE * within_bank("linear", scaling.standardise(bank.features), bank)
    target, f = bank.collapsed.astype(np.float64), np.zeros(len(bank))
    identity = np.eye(len(bank))
    for _ in range(NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-f))
        root = np.sqrt(probability * (1 - probability))
        inverse = np.linalg.inv(identity + root[:, None] * k * root[None])
        b = root**2 * f + target - probability
        a = b - root * (inverse @ (root * (k @ b)))
        previous, f = f, k @ a
        if np.abs(f - previous).max() < 1e-8:
            break
    probability = 1 / (1 + np.exp(-f))
    root = np.sqrt(probability * (1 - probability))
    inverse = np.linalg.inv(identity + root[:, None] * k * root[None])
    return CollapseModel(bank, scaling, target - probability, root[:, None] * inverse * root[None])


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
    own = COLLAPSE_VARIANCE * (MEAN_VARIANCE + 2 + 2 * np.square(x).sum(1) / max(1, x.shape[1]))
    variance = np.maximum(own - ((k @ model.noise_inverse) * k).sum(1), 0.0)
    spread = NORMAL_QUANTILE * np.sqrt(variance)
    mean = log_odds / np.sqrt(1 + math.pi * variance / 8)
    probability, low, high = (
        1 / (1 + np.exp(-z)) for z in (mean, log_odds - spread, log_odds + spread)
    )
    return probability, low, high
