"""Calibration of stated confidences: over-confidence, Brier score and calibration error.

The sampling unit of every interval is the problem: the answers to one problem belong together.

Shapes: M problems, S samples of each, N answers that have a confidence, K bins.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput
from diagnostics.stats import Array
from opd.evaluation.statistics import mean_interval, ratio_values

NUM_BINS = 10
"""Largest number of bins of the calibration error."""
ANSWERS_PER_BIN = 20
"""Fewer answers make fewer bins: a bin of few answers shows little but noise."""
RESAMPLES = 1000
"""Draws of the noise from which the interval of the calibration error is computed."""
TAIL = 0.025


@dataclass(frozen=True, eq=False)
class BinTotals:
    """Sums over the answers of each problem in each bin."""

    count: Array
    """(M, K) numbers of answers."""
    confidence: Array
    """(M, K) sums of their confidences."""
    correct: Array
    """(M, K) numbers of correct ones."""

    @property
    def excess(self) -> Array:
        """(M, K) sums of confidence - correctness."""
        return self.confidence - self.correct


def vote_confidence(answers: Sequence[Sequence[str | None]]) -> Array:
    """Return the share of a problem's other samples that state the same answer as a sample.

    Without the sample itself the share is unbiased for the probability of its answer; with it, it
    would be too high by up to 1/S. An unreadable sample votes for nothing and has no confidence.

    Args:
        answers: (M, S) votes; None where unreadable. S is at least 2.

    Returns:
        (M, S) shares, NaN where the answer is None.

    Raises:
        InvalidInput: Problems have fewer than 2 samples.
    """
    if min(map(len, answers)) < 2:
        raise InvalidInput("a vote needs at least 2 samples of each problem; raise eval_samples")
    shares = []
    for row in answers:
        votes = Counter(row)
        shares.append(
            [np.nan if answer is None else (votes[answer] - 1) / (len(row) - 1) for answer in row]
        )
    return np.array(shares)


def excess_by_problem(confidence: Array, correct: Array) -> tuple[Array, Array]:
    """Return (M,) sums of confidence - correctness over the answers, and (M,) their numbers."""
    has_confidence = ~np.isnan(confidence)
    difference = np.where(has_confidence, confidence - correct, 0.0)
    return difference.sum(1), has_confidence.sum(1)


def over_confidence(confidence: Array, correct: Array) -> dict[str, float]:
    """Return mean confidence - accuracy of the answers, with its 95 % interval over problems.

    It is a difference of means over the same answers: no bins, and unbiased where all samples have
    an answer.

    Args:
        confidence: (M, S) confidences; NaN where a sample has no answer.
        correct: (M, S) bool.

    Returns:
        `over_confidence`, `over_confidence/low`, `over_confidence/high`; empty without answers.
    """
    sums, counts = excess_by_problem(confidence, correct)
    if not counts.any():
        return {}
    values = ratio_values(sums, counts)
    return with_interval("over_confidence", float(values.mean()), *mean_interval(values))


def calibration_metrics(
    confidence: Array, correct: Array, generator: np.random.Generator
) -> dict[str, Any]:
    """Return the calibration of confidences, over the samples that have one.

    - `answered`: share of the samples with a confidence; `confidence` and `accuracy`: their means.
    - `over_confidence`: confidence - accuracy (`over_confidence`).
    - `brier`: mean squared difference of confidence and correctness (Brier 1950), of 0 to 1.
    - `ece`: the expected calibration error (Naeini et al. 2015), the mean over `bins` of the
      absolute difference of confidence and accuracy. Its expectation is above the truth: noise in a
      bin never cancels that of another one. `ece_debiased` is below it
      (`debiased_calibration_error`), and 0 on average for a calibrated model, so that the two
      enclose the truth on average. The interval is `calibration_error_interval`.
    - `bins`: number of answers, mean confidence and accuracy of each.

    Args:
        confidence: (M, S) confidences in [0, 1]; NaN where a sample has no answer.
        correct: (M, S) bool.
        generator: Random generator of the interval of the calibration error.

    Returns:
        Metrics by name; each mean with `/low` and `/high`. `answered` alone without answers.

    Raises:
        InvalidInput: A confidence is not in [0, 1].
    """
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    has_confidence = ~np.isnan(confidence)
    values = confidence[has_confidence]
    if not ((values >= 0) & (values <= 1)).all():
        raise InvalidInput(
            f"a confidence is {values[(values < 0) | (values > 1)][0]:g}, not in 0-1"
        )
    metrics: dict[str, Any] = {"answered": float(has_confidence.mean())}
    if not len(values):
        return metrics
    squares = np.where(has_confidence, (confidence - correct) ** 2, 0.0).sum(1)
    brier_values = ratio_values(squares, has_confidence.sum(1))
    totals = bin_totals(confidence, correct)
    error = calibration_error(totals)
    return metrics | {
        "confidence": float(values.mean()),
        "accuracy": float(correct[has_confidence].mean()),
        **over_confidence(confidence, correct),
        **with_interval("brier", float(brier_values.mean()), *mean_interval(brier_values, 0.0)),
        **with_interval("ece", error, *calibration_error_interval(totals, generator)),
        "ece_debiased": debiased_calibration_error(totals),
        "bins": [
            [int(count), float(total / count), float(right / count)]
            for count, total, right in zip(
                totals.count.sum(0), totals.confidence.sum(0), totals.correct.sum(0), strict=True
            )
        ],
    }


def with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """Return a metric and the ends of its interval, by name."""
    return {name: value, f"{name}/low": low, f"{name}/high": high}


def bin_totals(confidence: Array, correct: Array, num_bins: int | None = None) -> BinTotals:
    """Sum answers over bins of equal numbers of answers, by rising confidence.

    Equal confidences are in the same bin: that of the middle of their ranks.

    Args:
        confidence: (M, S) confidences; NaN where a sample has no answer.
        correct: (M, S) correctness.
        num_bins: Number of bins; None: NUM_BINS, or fewer to have ANSWERS_PER_BIN in each.

    Returns:
        The sums, without empty bins.
    """
    has_confidence = ~np.isnan(confidence)
    problems = np.nonzero(has_confidence)[0]
    values, outcomes = confidence[has_confidence], np.asarray(correct, float)[has_confidence]
    if num_bins is None:
        num_bins = max(1, min(NUM_BINS, len(values) // ANSWERS_PER_BIN))
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - counts / 2
    bins = (middle_rank * num_bins / len(values)).astype(int)[group]  # the last rank is below N
    used, bins = np.unique(bins, return_inverse=True)
    totals = np.zeros((3, len(confidence), len(used)))
    for total, addend in zip(totals, (np.ones_like(values), values, outcomes), strict=True):
        np.add.at(total, (problems, bins), addend)
    return BinTotals(*totals)


def calibration_error(totals: BinTotals) -> float:
    """Return the mean over answers of |confidence - accuracy| of their bin; biased upwards."""
    return float(np.abs(totals.excess.sum(0)).sum() / totals.count.sum())


def debiased_calibration_error(totals: BinTotals) -> float:
    """Return the calibration error with the sign of each bin taken from the other problems.

    sum_k sum_i sign(D_k - d_ik) d_ik / N, with d_ik the excess of problem i in bin k and D_k its
    sum over problems. For given bins the sign is independent of d_ik, so the mean is sum_k E[sign]
    E[D_k] / N: 0 where a bin is calibrated, never above the true error, and equal to it where the
    sign is certain. It may be below 0, which shows no miscalibration.

    Args:
        totals: The sums.

    Returns:
        The error.
    """
    excess = totals.excess
    signs = np.sign(np.round(excess.sum(0) - excess, 12))
    return float((signs * excess).sum() / totals.count.sum())


def calibration_error_interval(
    totals: BinTotals, generator: np.random.Generator
) -> tuple[float, float]:
    """Compute a 95 % interval of the calibration error over problems.

    A percentile bootstrap adds the upward bias a second time; of a calibrated model its interval
    never holds 0. Instead this collects the true errors that the measured one is compatible with:
    e is inside if `calibration_error` lies between the 2.5 % and the 97.5 % quantile of
    sum_k |N_k e + Z_k| / N, where the noise Z of the K totals is normal with their covariance over
    problems, and every bin is taken to have the same error. The variance of half an answer in each
    bin is added, so that answers that agree by chance claim no certainty.

    Args:
        totals: The sums.
        generator: Random generator of the noise.

    Returns:
        (low, high).
    """
    counts, num_problems = totals.count.sum(0), len(totals.count)
    residual = totals.excess - totals.count * (totals.excess.sum(0) / counts)
    residual *= np.sqrt(num_problems / max(1, num_problems - 1))
    noise = generator.standard_normal((RESAMPLES, num_problems)) @ residual
    noise += 0.5 * generator.standard_normal(noise.shape)
    error = calibration_error(totals)

    def errors(true_error: float) -> Array:
        return np.asarray(np.abs(counts * true_error + noise).sum(1) / counts.sum())

    low = first_true(lambda e: bool((errors(e) >= error).mean() >= TAIL))
    # what is measured may be less than noise alone makes of a calibrated model
    typical = max(error, float(np.median(errors(0.0))))
    high = first_true(lambda e: bool((errors(e) <= typical).mean() < TAIL))
    return min(low, error), high


def first_true(holds: Callable[[float], bool], steps: int = 17) -> float:
    """Return where a condition that is false and then true on [0, 1] becomes true; 1 if never."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
