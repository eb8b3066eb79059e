"""Bias-variance trade-off of an estimator for a batch of n independent trajectories."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def mse(bias2: Array, variance: Array, n: float) -> Array:
    """Return the mean squared error of a mean of n trajectories, |bias|^2 + variance / n."""
    return np.asarray(bias2) + np.asarray(variance) / n


def optimal_gamma(gammas: Array, bias2: Array, variance: Array, n: float) -> Array:
    """Return the discount of least mean squared error.

    Args:
        gammas: (G,) discounts.
        bias2: (..., G) squared bias.
        variance: (..., G) variance of one trajectory.
        n: Batch size.

    Returns:
        (...) discounts.
    """
    return np.asarray(gammas)[mse(bias2, variance, n).argmin(-1)]


def crossover_batch_size(bias2: Array, variance: Array, unbiased_variance: Array) -> Array:
    """Return the batch size from which an unbiased estimator errs less than a biased one.

    Args:
        bias2: Squared bias of the biased estimator.
        variance: Variance of the biased estimator.
        unbiased_variance: Variance of the unbiased estimator.

    Returns:
        (unbiased_variance - variance) / bias2: 0 or less where the unbiased one is never worse,
        infinite where there is no bias to compensate.
    """
    gain = np.asarray(unbiased_variance) - np.asarray(variance)
    bias2 = np.asarray(bias2, dtype=np.float64)
    without_bias = np.where(gain > 0, np.inf, 0.0)
    return np.divide(gain, bias2, out=without_bias, where=bias2 > 0)


def improvement(slope: Array, curvature: Array, noise: Array, n: float, rate: float) -> Array:
    """Return the second-order decrease of J by a step along the mean of n estimates.

    Args:
        slope: As in `synthetic.exact.curvature.StepEffect`.
        curvature: As in `StepEffect`.
        noise: As in `StepEffect`.
        n: Batch size.
        rate: Step size.

    Returns:
        rate slope - rate^2 / 2 (curvature + noise / n).
    """
    return rate * np.asarray(slope) - rate**2 / 2 * (np.asarray(curvature) + np.asarray(noise) / n)


def best_improvement(slope: Array, curvature: Array, noise: Array, n: float) -> Array:
    """Return the second-order decrease of J at the best step size for n estimates.

    Args:
        slope: As in `synthetic.exact.curvature.StepEffect`.
        curvature: As in `StepEffect`.
        noise: As in `StepEffect`.
        n: Batch size.

    Returns:
        slope^2 / (2 (curvature + noise / n)); infinite where curvature + noise / n is not positive,
        where J curves down along the step and no step size is best to second order.
    """
    effective_curvature = np.asarray(curvature) + np.asarray(noise) / n
    square = np.asarray(slope) ** 2
    return np.divide(
        square,
        2 * effective_curvature,
        out=np.full_like(square, np.inf),
        where=effective_curvature > 0,
    )
