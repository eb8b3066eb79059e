"""How well forecasts order runs: rank correlation within methods, and the area under the ROC curve.

Every run has a weight in each of r resamples, how often it was drawn: a score is that of as many
copies of it. Weights of 1 give the score of the runs themselves.

Shapes: n runs, r resamples.
"""

import numpy as np

from opd.analysis.scout.bank import Array

MIN_RUNS = 4
"""Fewest runs of a method whose rank correlation counts."""


def average_ranks(values: Array, weights: Array) -> Array:
    """Return ranks from 1 among all copies; equal values have the mean of their ranks.

    Args:
        values: (n,) values.
        weights: (r, n) copies of each.

    Returns:
        (r, n) ranks.
    """
    _, index = np.unique(values, return_inverse=True)
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Array = (np.cumsum(counts, 1) - (counts - 1) / 2)[:, index]
    return ranks


def spearman(x: Array, y: Array, weights: Array) -> Array:
    """Return (r,) Spearman's rank correlations; NaN where either is constant.

    Args:
        x: (n,) values.
        y: (n,) values.
        weights: (r, n) copies of each.

    Returns:
        The correlations.
    """
    a, b = (average_ranks(values, weights) for values in (x, y))
    count = weights.sum(1, keepdims=True).clip(min=1)
    a, b = (ranks - (weights * ranks).sum(1, keepdims=True) / count for ranks in (a, b))
    norm = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    product = (weights * a * b).sum(1)
    return np.divide(product, norm, out=np.full(len(weights), np.nan), where=norm > 0)


def spearman_within(x: Array, y: Array, method: Array, weights: Array) -> Array:
    """Return the mean over methods of the rank correlation of their runs, weighted by runs.

    What tells pairs apart counts, and not what tells methods apart. A constant x predicts nothing
    of a method: its correlation is 0. Methods whose y is constant, or with fewer than MIN_RUNS
    runs, do not count.

    Args:
        x: (n,) forecasts; runs with NaN are left out.
        y: (n,) outcomes.
        method: (n,) methods.
        weights: (r, n) copies of each run.

    Returns:
        (r,) correlations; NaN where no method counts.
    """
    total, count = np.zeros(len(weights)), np.zeros(len(weights))
    for name in np.unique(method):
        rows = np.flatnonzero((method == name) & np.isfinite(x))
        if not len(rows):
            continue
        copies, outcome = weights[:, rows], y[rows]
        highest = np.where(copies > 0, outcome, -np.inf).max(1)
        lowest = np.where(copies > 0, outcome, np.inf).min(1)
        num_runs = np.where(highest > lowest, copies.sum(1), 0)
        num_runs = np.where(num_runs >= MIN_RUNS, num_runs, 0)
        total += num_runs * np.nan_to_num(spearman(x[rows], outcome, copies))
        count += num_runs
    return np.divide(total, count, out=np.full(len(weights), np.nan), where=count > 0)


def auroc(score: Array, positive: Array, weights: Array) -> Array:
    """Return the probability that a positive run has a higher score than a negative one.

    Ties count one half. (The Mann-Whitney statistic over the number of pairs of runs.)

    Args:
        score: (n,) scores; runs with NaN are left out.
        positive: (n,) bool.
        weights: (r, n) copies of each run.

    Returns:
        (r,) areas under the ROC curve; NaN where all runs are positive, or none.
    """
    known_score = np.isfinite(score)
    if not known_score.any():
        return np.full(len(weights), np.nan)
    copies = weights[:, known_score]
    positive_copies = copies * positive[known_score]
    num_positive = positive_copies.sum(1)
    num_pairs = num_positive * (copies.sum(1) - num_positive)
    rank_sum = (positive_copies * average_ranks(score[known_score], copies)).sum(1)
    num_ordered = rank_sum - num_positive * (num_positive + 1) / 2
    return np.divide(num_ordered, num_pairs, out=np.full(len(weights), np.nan), where=num_pairs > 0)


def method_averages(gain: Array, method: Array, pair: Array) -> dict[str, float]:
    """Return the gain of each method on an average pair, by least squares on method and pair.

    Methods were not run on the same pairs: one that was run only where all do well would have the
    highest plain mean. With gain = a[method] + b[pair] + noise, this is a[method] plus the mean of
    b over pairs; where every method was run on every pair, it is the plain mean.

    Args:
        gain: (n,) gains.
        method: (n,) methods.
        pair: (n,) pairs.

    Returns:
        Method to average.
    """
    methods, method_index = np.unique(method, return_inverse=True)
    pairs, pair_index = np.unique(pair, return_inverse=True)
    design = np.zeros((len(gain), len(methods) + len(pairs)))
    rows = np.arange(len(gain))
    design[rows, method_index] = 1.0
    design[rows, len(methods) + pair_index] = 1.0
    effects = np.linalg.lstsq(design, gain, rcond=None)[0]
    averages = effects[: len(methods)] + effects[len(methods) :].mean()
    return {str(name): float(average) for name, average in zip(methods, averages, strict=True)}
