"""Bias against variance: what a batch of n independent trajectories makes of an estimator."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def mse(bias2: Array, variance: Array, n: float) -> Array:
    """Mean squared error of a mean of n trajectories, |bias|^2 + variance / n."""
    return np.asarray(bias2) + np.asarray(variance) / n


def optimal_gamma(gammas: Array, bias2: Array, variance: Array, n: float) -> Array:
    """The discount of least error; gammas (G,), bias2 and variance (..., G) -> (...)."""
    return np.asarray(gammas)[mse(bias2, variance, n).argmin(-1)]


def overtaking_batch(bias2: Array, variance: Array, unbiased_variance: Array) -> Array:
    """The n from which an unbiased estimator errs less than a biased one.

    (unbiased_variance - variance) / bias2: 0 or less where the unbiased one is never worse,
    infinite where there is no bias to overtake.
    """
    gain = np.asarray(unbiased_variance) - np.asarray(variance)
    bias2 = np.asarray(bias2, dtype=np.float64)
    nothing = np.where(gain > 0, np.inf, 0.0)
    return np.divide(gain, bias2, out=nothing, where=bias2 > 0)


def improvement(slope: Array, curvature: Array, noise: Array, n: float, rate: float) -> Array:
    """Second-order decrease of J by a step of size `rate` along the mean of n estimates.

    rate slope - rate^2 / 2 (curvature + noise / n), of the parts in `synthetic.exact.curvature.Step`.
    """
    return rate * np.asarray(slope) - rate**2 / 2 * (np.asarray(curvature) + np.asarray(noise) / n)


def best_improvement(slope: Array, curvature: Array, noise: Array, n: float) -> Array:
    """The same at its own best step size, slope^2 / (2 (curvature + noise / n)).

    Infinite where curvature + noise / n is not positive: J curves down along the step, and the
    second order knows no best size.
    """
    bend = np.asarray(curvature) + np.asarray(noise) / n
    square = np.asarray(slope) ** 2
    return np.divide(square, 2 * bend, out=np.full_like(square, np.inf), where=bend > 0)
