"""Confidence intervals over independent repetitions (seeds, sampled worlds, prompts, problems).

Accuracies and their differences have closed-form intervals, which keep a positive width where all
problems agree and for few problems; other statistics use the bootstrap.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.packages import load_package

Array = NDArray[Any]
Z = 1.959964
"""97.5 % quantile of the standard normal distribution."""


def bootstrap_interval(
    values: Array,
    statistic: Callable[[Array], Array],
    generator: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
    strata: Array | None = None,
) -> tuple[Array, Array]:
    """Compute a percentile bootstrap interval of a statistic of repetitions.

    Whole repetitions are resampled, so everything measured on one stays together and intervals of
    differences or ratios are paired. With `strata`, each label keeps its number of repetitions.
    The interval covers only what differs between repetitions. (Efron 1979; stratified over tasks
    as in arXiv 2108.13264.)

    Args:
        values: (N, ...), one entry per repetition.
        statistic: (N, ...) -> any shape; must not depend on the order of repetitions.
        generator: Random generator of the resamples.
        level: Coverage, in (0, 1).
        resamples: Number of bootstrap samples.
        strata: (N,) labels, or None for one stratum.

    Returns:
        (low, high), each of the statistic's shape.

    Raises:
        InvalidInput: Fewer than 2 repetitions in a stratum, or a level outside (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if not 0 < level < 1:
        raise InvalidInput(f"level is {level}, expected a number in (0, 1)")
    labels = np.zeros(len(values), dtype=np.int64) if strata is None else np.asarray(strata)
    if labels.shape != values.shape[:1]:
        raise InvalidInput(
            f"strata has shape {labels.shape}, but values holds {len(values)} repetitions"
        )
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    smallest = min(map(len, groups), default=0)
    if smallest < 2:
        raise InvalidInput(f"a stratum holds {smallest} repetitions; an interval needs at least 2")
    draws = [g[generator.integers(0, len(g), size=(resamples, len(g)))] for g in groups]
    different, which = _different_resamples(np.concatenate(draws, axis=1))
    resampled = np.stack([statistic(values[indices]) for indices in different])[which]
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def _different_resamples(draws: Array) -> tuple[Array, Array]:
    """Return the resamples that differ in more than their order, and which of these each one is.

    Few repetitions have few of them: 4 have 35, 6 have 462.
    """
    resamples, repetitions = draws.shape
    if math.comb(2 * repetitions - 1, repetitions) >= resamples:
        return draws, np.arange(resamples)
    different, which = np.unique(np.sort(draws, axis=1), axis=0, return_inverse=True)
    return different, which.reshape(-1)


def share_interval(values: Array) -> tuple[float, float]:
    """Compute a 95 % interval of a mean accuracy over problems, or over runs and problems.

    Never degenerate. Wilson's score interval for the number of independent problems that has the
    observed variance of the mean. Problems are the sampling unit: two squared deviations of the
    largest variance that a share of this mean can have, p (1 - p), are added to the observed ones,
    and that variance also bounds the result, so that few problems that agree by chance do not claim
    certainty. With one answer per problem it is Wilson's interval for M problems; where all are
    right or all wrong, that of M problems, however many samples and runs there are. Runs add the
    variance of their means, with Student's t for their number (Satterthwaite). (Wilson 1927;
    effective sample sizes: Korn and Graubard 1998.)

    Args:
        values: (M,) or (N, M), shares in [0, 1] of M problems, by N runs on the same problems.

    Returns:
        (low, high).

    Raises:
        InvalidInput: No value, or one outside [0, 1].
    """
    table = _table(values, 0.0)
    runs, problems = table.shape
    mean = float(table.mean())
    largest = mean * (1 - mean)
    if largest <= 1e-12:
        return wilson_interval(round(mean), problems)
    squares = float(np.square(table.mean(0) - mean).sum())
    variance = min(largest, (squares + 2 * largest) / (problems + 1)) / problems
    between = _between_runs(table)
    total = variance + between
    return wilson_interval(mean, largest / total, _critical(total, between, runs))


def wilson_interval(share: float, count: float, critical: float = Z) -> tuple[float, float]:
    """Compute the score interval of a share of `count` independent problems, any real number."""
    square = critical * critical / count
    centre = share + square / 2
    half_width = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (centre - half_width) / (1 + square)), min(
        1.0, (centre + half_width) / (1 + square)
    )


def gain_interval(values: Array, comparisons: int = 1) -> tuple[float, float]:
    """Compute a 95 % interval of a mean paired difference of shares; never degenerate.

    Wald's interval after adding two problems, one gained and one lost. With one answer per problem
    they are 1 and -1, and the interval is that of Bonett and Price (2012, J. Educ. Behav. Stat.
    37); where the differences are finer (several samples or runs) they are as large as the root
    mean square of the observed changes and one whole problem. Runs add the variance of their means,
    with Student's t for their number (Satterthwaite).

    Args:
        values: (M,) or (N, M), differences in [-1, 1] on M problems, by N runs on the same
            problems.
        comparisons: Number of such intervals that hold together with 95 % (Bonferroni).

    Returns:
        (low, high).

    Raises:
        InvalidInput: No value, or one outside [-1, 1].
    """
    table = _table(values, -1.0)
    runs, problems = table.shape
    difference = table.mean(0)
    squares = float(np.square(difference).sum())
    added_square = (squares + 1) / (np.count_nonzero(difference) + 1)
    centre = float(difference.sum()) / (problems + 2)
    variance = ((squares + 2 * added_square) / (problems + 2) - centre**2) / (problems + 2)
    between = _between_runs(table)
    total = variance + between
    half_width = _critical(total, between, runs, comparisons) * math.sqrt(total)
    mean = float(table.mean())
    return max(-1.0, min(centre - half_width, mean)), min(1.0, max(centre + half_width, mean))


def runs_interval(values: Array, lows: Array, highs: Array) -> tuple[float, float]:
    """Compute a 95 % interval of the mean of runs, from the interval of each over its problems.

    For measures without a value in [-1, 1] of every problem, which `gain_interval` needs. The
    variance over problems, from the widths of the intervals, and that of the runs' means are added,
    with Student's t for their number (Satterthwaite). Where runs have problems of their own, the
    second contains the first, so that the interval is wider than it must be.

    Args:
        values: (N,) values of the runs.
        lows: (N,) lower ends of their 95 % intervals.
        highs: (N,) upper ends.

    Returns:
        (low, high); that of the run if there is one.
    """
    runs = len(values)
    if runs == 1:
        return float(lows[0]), float(highs[0])
    errors = (np.asarray(highs) - np.asarray(lows)) / (2 * Z)
    between = _between_runs(np.asarray(values, dtype=np.float64)[:, None])
    total = float(np.square(errors).sum()) / runs**2 + between
    half_width = _critical(total, between, runs) * math.sqrt(total)
    mean = float(np.mean(values))
    return mean - half_width, mean + half_width


def unpaired_interval(before_accuracies: Array, after_accuracies: Array) -> tuple[float, float]:
    """Compute a 95 % interval of the difference of mean accuracies on different problems.

    Combines two `share_interval`s by Newcombe's square-and-add (1998, Statist. Med. 17, method 10).

    Args:
        before_accuracies: (M,) or (N, M) shares.
        after_accuracies: (M',) or (N', M') shares.

    Returns:
        (low, high) of mean(after) - mean(before).
    """
    (low_before, high_before), (low_after, high_after) = map(
        share_interval, (before_accuracies, after_accuracies)
    )
    before_mean, after_mean = float(np.mean(before_accuracies)), float(np.mean(after_accuracies))
    low = after_mean - before_mean - math.hypot(after_mean - low_after, high_before - before_mean)
    high = after_mean - before_mean + math.hypot(high_after - after_mean, before_mean - low_before)
    return low, high


def problem_accuracies(outcomes: str) -> Array:
    """Return (M,) shares of correct responses to each problem.

    Args:
        outcomes: One digit per sample, with a space between problems if they have several samples
            (`opd.evaluation.statistics.encode_outcomes`).

    Returns:
        The shares.
    """
    if " " not in outcomes:
        return np.array(list(outcomes), dtype=np.float64)
    return np.array([sum(map(int, samples)) / len(samples) for samples in outcomes.split()])


def t_critical(degrees: float, comparisons: int = 1) -> float:
    """Return the 97.5 % quantile of Student's t, or that of several intervals (Bonferroni).

    Args:
        degrees: Degrees of freedom; infinity for the normal distribution.
        comparisons: Number of intervals that hold together with 95 %.

    Returns:
        The quantile of 1 - 0.025 / comparisons.
    """
    special = load_package("scipy.special", "an interval from Student's t", "study")
    return float(special.stdtrit(degrees, 1 - 0.025 / comparisons))


def pool_means(
    values: list[float], errors: list[float], weights: list[float]
) -> tuple[float, float]:
    """Return the weighted mean of independent values and its error, from standard errors."""
    w = np.array(weights) / np.sum(weights)
    return float((w * values).sum()), float(np.sqrt((w**2 * np.square(errors)).sum()))


def round_significant(value: float | None, digits: int = 5) -> float:
    """Round to significant digits, as in tables; NaN for None."""
    return float("nan") if value is None else float(f"{value:.{digits}g}")


def _table(values: Array, minimum: float) -> Array:
    """Return (N, M) float64 of (M,) or (N, M) values in [minimum, 1]."""
    table = np.asarray(values, dtype=np.float64)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size:
        raise InvalidInput(f"values have shape {np.shape(values)}, expected (runs, problems)")
    is_outside = ~((table >= minimum) & (table <= 1))
    if is_outside.any():
        raise InvalidInput(
            f"{is_outside.sum()} of {table.size} values are outside [{minimum:g}, 1]; the first is "
            f"{table[is_outside][0]:g}"
        )
    return table


def _between_runs(table: Array) -> float:
    """Return the variance of the mean of runs, from the means of (N, M) values; 0 for one run."""
    return float(table.mean(1).var(ddof=1)) / len(table) if len(table) > 1 else 0.0


def _critical(total: float, between: float, runs: int, comparisons: int = 1) -> float:
    """Return Student's t for a variance that is partly estimated between runs."""
    if between > 1e-9 * total:
        return t_critical((runs - 1) * (total / between) ** 2, comparisons)
    return Z if comparisons == 1 else t_critical(math.inf, comparisons)
