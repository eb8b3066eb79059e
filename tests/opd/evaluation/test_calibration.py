"""Calibration against closed forms, plain loops and the enumeration of all outcomes."""

import math
from itertools import product

import numpy as np
import pytest

from diagnostics.stats import gain_interval
from opd.evaluation.calibration import (
    bin_totals,
    calibration_error,
    calibration_error_interval,
    calibration_metrics,
    debiased_calibration_error,
    over_confidence,
    vote_confidence,
)
from opd.evaluation.statistics import mean_interval, ratio_values, summarize

NAN = float("nan")


def binned(confidence: list, correct: list, num_bins: int):
    return bin_totals(np.array(confidence, float), np.array(correct, float), num_bins)


def test_bins_have_equal_numbers_of_answers_and_keep_equal_confidences_together() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.permutation(np.linspace(0.01, 0.99, 48)).reshape(12, 4)
    correct = generator.random((12, 4)) < 0.5
    totals = bin_totals(confidence, correct, 6)
    assert totals.count.sum(0).tolist() == [8] * 6
    order = np.argsort(confidence, axis=None)
    for k in range(6):
        rows = order[8 * k : 8 * k + 8]
        assert totals.confidence.sum(0)[k] == pytest.approx(confidence.flat[rows].sum())
        assert totals.correct.sum(0)[k] == correct.flat[rows].sum()
    np.testing.assert_allclose(totals.confidence.sum(1), confidence.sum(1))
    # ties: 3 x 0.5 and 1 x 0.9 in two bins; the three stay in one, whatever their order
    for row in ([0.5, 0.5, 0.5, 0.9], [0.9, 0.5, 0.5, 0.5]):
        totals = binned([[x] for x in row], [[1.0]] * 4, 2)
        assert totals.count.sum(0).tolist() == [3, 1]
    assert binned([[1.0]] * 5, [[1.0]] * 5, 3).count.sum(0).tolist() == [5], (
        "empty bins are left out"
    )
    assert bin_totals(
        np.full((100, 2), 0.5) + np.arange(200).reshape(100, 2) / 1e3, np.ones((100, 2))
    ).count.shape == (100, 10)
    assert bin_totals(np.arange(70).reshape(70, 1) / 100, np.ones((70, 1))).count.shape == (70, 3)


def test_metrics_are_those_of_plain_loops_over_answers() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.random((40, 3))
    confidence[generator.random((40, 3)) < 0.2] = NAN
    confidence[7] = NAN
    correct = generator.random((40, 3)) < 0.6
    metrics = calibration_metrics(confidence, correct, np.random.default_rng(0))
    pairs = sorted(
        (float(p), float(c))
        for p, c in zip(confidence.flat, correct.flat, strict=True)
        if not math.isnan(p)
    )
    size = len(pairs)
    assert metrics["answered"] == pytest.approx(size / 120)
    assert metrics["brier"] == pytest.approx(sum((p - c) ** 2 for p, c in pairs) / size)
    assert metrics["over_confidence"] == pytest.approx(sum(p - c for p, c in pairs) / size)
    assert metrics["over_confidence"] == pytest.approx(metrics["confidence"] - metrics["accuracy"])
    num_bins = size // 20
    assert len(metrics["bins"]) == num_bins < 10
    bins: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for rank, pair in enumerate(pairs):
        bins[int((rank + 0.5) * num_bins / size)].append(pair)
    error = sum(abs(sum(p - c for p, c in pairs_of_bin)) for pairs_of_bin in bins) / size
    assert metrics["ece"] == pytest.approx(error)
    for row, pairs_of_bin in zip(metrics["bins"], bins, strict=True):
        assert row == pytest.approx([len(pairs_of_bin), *np.mean(pairs_of_bin, axis=0)])
    for name in ("over_confidence", "brier", "ece"):
        assert metrics[f"{name}/low"] <= metrics[name] <= metrics[f"{name}/high"]
    assert calibration_metrics(confidence * NAN, correct, generator) == {"answered": 0.0}
    with pytest.raises(ValueError, match=r"a confidence is 1\.5"):
        calibration_metrics(np.array([[1.5]]), np.array([[True]]), generator)


def test_a_vote_leaves_the_voter_out_and_is_unbiased() -> None:
    """Over all draws of S samples the over-confidence is that of the answers' probabilities."""
    shares = vote_confidence([["a", "a", "b", None], ["c"] * 4])
    np.testing.assert_allclose(shares, [[1 / 3, 1 / 3, 0, NAN], [1, 1, 1, 1]])
    chances = {"x": 0.5, "y": 0.3, "z": 0.2}  # y is right
    truth = sum(p * p for p in chances.values()) - chances["y"]
    for num_samples in (2, 3, 5):
        expected = 0.0
        for votes in product(chances, repeat=num_samples):
            weight = math.prod(chances[x] for x in votes)
            correct = np.array([[x == "y" for x in votes]])
            excess = over_confidence(vote_confidence([votes]), correct)
            expected += weight * excess["over_confidence"]
        assert expected == pytest.approx(truth)
    with pytest.raises(ValueError, match="at least 2 samples"):
        vote_confidence([["a"], ["b"]])


@pytest.mark.parametrize("chances", [(0.7, 0.4), (0.9, 0.2), (0.5, 0.75)])
def test_the_two_errors_enclose_the_truth(chances: tuple[float, float]) -> None:
    """All outcomes of 3 problems, each with an answer of confidence 0.4 and one of 0.7."""
    confidence = np.array([[0.4, 0.7]] * 3)
    accuracy = np.array([chances[1], chances[0]])
    truth = np.abs(accuracy - [0.4, 0.7]).mean()
    plain = debiased = loop = 0.0
    for outcome in product((0, 1), repeat=6):
        correct = np.array(outcome, float).reshape(3, 2)
        weight = np.where(correct == 1, accuracy, 1 - accuracy).prod()
        totals = bin_totals(confidence, correct, 2)
        plain += weight * calibration_error(totals)
        debiased += weight * debiased_calibration_error(totals)
        for i, k in product(range(3), range(2)):
            leave_one_out = sum(confidence[j, k] - correct[j, k] for j in range(3) if j != i)
            sign = 0.0 if abs(leave_one_out) < 1e-9 else math.copysign(1, leave_one_out)
            loop += weight * sign * (confidence[i, k] - correct[i, k]) / 6
    assert debiased == pytest.approx(loop, abs=1e-12)
    assert debiased <= truth + 1e-12 <= plain
    if chances == (0.7, 0.4):
        assert debiased == pytest.approx(0, abs=1e-12), "no bias for a calibrated model"
        assert plain > 0.1
    else:
        assert truth - debiased < plain or debiased > 0


def test_a_certain_error_is_measured_exactly() -> None:
    """Wrong with confidence 0.75, right with 0.6: an error of (0.75 + 0.4) / 2 without noise."""
    confidence = np.array([[0.75, 0.6]] * 30)
    correct = np.array([[0.0, 1.0]] * 30)
    metrics = calibration_metrics(confidence, correct, np.random.default_rng(0))
    assert metrics["ece"] == pytest.approx(0.575)
    assert metrics["ece_debiased"] == pytest.approx(0.575)
    assert metrics["over_confidence"] == pytest.approx((0.75 - 0.4) / 2)
    assert metrics["brier"] == pytest.approx((0.75**2 + 0.4**2) / 2)
    assert 0.5 < metrics["ece/low"] < 0.575 < metrics["ece/high"] < 0.65


def covers(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_the_interval_of_the_error_covers_it(shift: float) -> None:
    """Answers of one problem agree; a percentile bootstrap covers a calibrated model never."""
    generator = np.random.default_rng(2)
    problems, samples, repeats = 150, 2, 40
    num_covered = num_bootstrap_covered = 0
    for _ in range(repeats):
        confidence = generator.uniform(0.3, 0.9, (problems, samples))
        noise = np.where(
            generator.random((problems, samples)) < 0.5,
            generator.random((problems, 1)),
            generator.random((problems, samples)),
        )
        totals = bin_totals(confidence, noise < confidence - shift)
        num_covered += covers(calibration_error_interval(totals, generator), shift)
        weights = generator.multinomial(problems, np.full(problems, 1 / problems), 200)
        errors = np.abs(weights @ totals.excess).sum(1) / (problems * samples)
        low, high = np.quantile(errors, [0.025, 0.975])
        num_bootstrap_covered += covers((low, high), shift)
    assert num_covered / repeats > 0.89
    if shift == 0:
        assert num_bootstrap_covered == 0


def test_the_interval_of_one_bin_is_that_of_a_normal_mean() -> None:
    """Of few problems, whose variance is the unbiased one; half an answer of noise is added."""
    confidence = np.full((3, 40), 0.9)
    correct = (np.arange(40) < np.array([[4], [12], [8]])).astype(float)
    totals = bin_totals(confidence, correct, 1)
    sums = (confidence - correct).sum(1)
    error = math.sqrt(3 * sums.var(ddof=1) + 0.25) / 120
    ends = [calibration_error_interval(totals, np.random.default_rng(seed)) for seed in range(30)]
    low, high = np.mean(ends, axis=0)
    assert low == pytest.approx(0.7 - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(0.7 + 1.96 * error, abs=0.1 * error)


def test_problems_with_more_answers_count_more() -> None:
    generator = np.random.default_rng(3)
    counts = np.array([0, 1, 2, 3, 4] * 40)
    sums = np.array([generator.uniform(-1, 1, n).sum() for n in counts])
    values = ratio_values(sums, counts)
    assert values.mean() == pytest.approx(sums.sum() / counts.sum())
    # the jackknife's variance of a ratio is the oracle of the linearised one
    leave_one_out = (sums.sum() - sums) / (counts.sum() - counts)
    variance = (len(counts) - 1) * np.square(leave_one_out - leave_one_out.mean()).mean()
    assert values.var(ddof=1) / len(counts) == pytest.approx(variance, rel=0.02)
    low, high = mean_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)
    equal = generator.uniform(-1, 1, 50)
    np.testing.assert_allclose(ratio_values(3 * equal, np.full(50, 3)), equal)
    assert mean_interval(equal) == gain_interval(equal)


def test_one_sided_confidence_is_no_certainty() -> None:
    metrics = calibration_metrics(np.ones((9, 2)), np.ones((9, 2)), np.random.default_rng(0))
    assert metrics["over_confidence"] == metrics["ece"] == metrics["brier"] == 0
    assert metrics["over_confidence/high"] > 0.1
    assert metrics["brier/high"] > 0.1
    assert metrics["brier/low"] == 0
    assert metrics["ece/high"] > 0.02


def test_the_gap_is_paired_by_problem() -> None:
    correct = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]], bool)
    metrics = summarize(correct, [["a"] * 4] * 4)
    assert metrics["gap@2"] == pytest.approx((0 + 0 + (5 / 6 - 1 / 2) + (1 / 2 - 1 / 4)) / 4)
    assert metrics["gap@4"] == pytest.approx(metrics["pass@4"] - metrics["accuracy"])
    # problems differ far more than their gaps do
    steady = np.tile([[1, 1, 1, 1], [0, 0, 0, 0]], (50, 1)).astype(bool)
    metrics = summarize(steady, [["a"] * 4] * 100)
    assert metrics["gap@4"] == 0 == metrics["gap@4/low"]
    assert metrics["gap@4/high"] < 0.05 < metrics["pass@4/high"] - metrics["pass@4/low"]
    assert "gap@1" not in summarize(correct[:, :1], [["a"]] * 4)
