"""How well forecasts order runs: rank correlation within methods, and the area under the ROC curve.

Shapes: n runs.
"""

import math

import numpy as np

from opd.analysis.scout.bank import Array

MIN_RUNS = 4
"""Fewest runs of a method whose rank correlation counts."""


def average_ranks(values: Array) -> Array:
    """Return (n,) ranks from 1; equal values have the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def spearman(x: Array, y: Array) -> float:
    """Return Spearman's rank correlation; NaN if either is constant."""
    a, b = (average_ranks(values) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def spearman_within(x: Array, y: Array, method: Array) -> float:
    """Return the mean over methods of the rank correlation of their runs, weighted by runs.

    What tells pairs apart counts, and not what tells methods apart. A constant x predicts nothing
    of a method: its correlation is 0. Methods whose y is constant, or with fewer than MIN_RUNS
    runs, do not count.

    Args:
        x: (n,) forecasts; runs with NaN are left out.
        y: (n,) outcomes.
        method: (n,) methods.

    Returns:
        The correlation; NaN if no method counts.
    """
    total = count = 0.0
    for name in np.unique(method):
        rows = (method == name) & np.isfinite(x)
        if rows.sum() < MIN_RUNS or np.ptp(y[rows]) == 0:
            continue
        rho = spearman(x[rows], y[rows])
        total += rows.sum() * (0.0 if math.isnan(rho) else rho)
        count += rows.sum()
    return total / count if count else math.nan


def auroc(score: Array, positive: Array) -> float:
    """Return the probability that a positive run has a higher score than a negative one.

    Ties count one half. (The Mann-Whitney statistic over the number of pairs of runs.)

    Args:
        score: (n,) scores; runs with NaN are left out.
        positive: (n,) bool.

    Returns:
        The area under the ROC curve; NaN if all runs are positive, or none.
    """
    known_score = np.isfinite(score)
    ranks, positive = average_ranks(score[known_score]), positive[known_score]
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    rank_sum = float(ranks[positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
