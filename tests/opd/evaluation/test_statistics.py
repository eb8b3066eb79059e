"""Repeated-sample accuracy and paired comparisons, against enumeration."""

import math
from itertools import combinations, product

import numpy as np
import pytest

from diagnostics.stats import gain_interval, share_interval, wilson_interval
from opd.evaluation.statistics import (
    compare,
    decode_outcomes,
    encode_outcomes,
    majority_at_k,
    mcnemar,
    pass_at_k,
    summarize,
)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample() -> None:
    for n in range(1, 7):
        for right, k in product(range(n + 1), range(1, n + 1)):
            samples = [1] * right + [0] * (n - right)
            share = np.mean([max(subset) for subset in combinations(samples, k)])
            assert pass_at_k(right, n, k) == pytest.approx(share, abs=1e-12)
    with pytest.raises(ValueError, match="k is 4, but each problem has 3 samples"):
        pass_at_k(1, 3, 4)


def voted(answers: list[str | None], worth: dict[str, float]) -> float:
    """Return the correctness of a vote with fair draws among ties."""
    votes = [a for a in answers if a is not None]
    if not votes:
        return 0.0
    top = max(map(votes.count, votes))
    winners = {a for a in votes if votes.count(a) == top}
    return sum(worth[a] for a in winners) / len(winners)


def test_majority_at_k_is_the_mean_over_subsets_and_ties() -> None:
    generator = np.random.default_rng(0)
    for trial in range(60):
        n = int(generator.integers(1, 9))
        answers = [None if x == 0 else "abcd"[x - 1] for x in generator.integers(0, 5, n)]
        worth = {a: float(generator.random() < 0.5) for a in "abcd"}
        if trial % 5 == 0:
            worth = {a: float(generator.random()) for a in "abcd"}
        right = [0.0 if a is None else worth[a] for a in answers]
        for k in range(1, n + 1):
            want = np.mean([voted(list(subset), worth) for subset in combinations(answers, k)])
            assert majority_at_k(answers, right, k) == pytest.approx(want, abs=1e-12)
    assert majority_at_k(["a", "b", "b", "a"], [1, 0, 0, 1], 4) == 0.5, (
        "ties are broken by a fair draw"
    )
    assert majority_at_k([None] * 5 + ["a"], [0] * 5 + [1], 6) == 1, (
        "unreadable answers have no vote"
    )
    big = majority_at_k(["a"] * 20 + ["b"] * 12, [0] * 20 + [1] * 12, 31)
    assert big == pytest.approx(0.0, abs=1e-12)


def test_both_are_unbiased_for_fresh_samples() -> None:
    """The mean over all draws of 4 samples equals the value for k = 2, 3 fresh ones."""
    chances = {"x": 0.5, "y": 0.3, None: 0.2}
    worth = {"x": 0.0, "y": 1.0}

    def expected(n: int, statistic) -> float:
        return sum(
            math.prod(chances[a] for a in samples) * statistic(list(samples))
            for samples in product(chances, repeat=n)
        )

    def right(answers: list) -> list[float]:
        return [0.0 if a is None else worth[a] for a in answers]

    for k in (2, 3):
        fresh = expected(k, lambda a: voted(a, worth))
        assert expected(4, lambda a: majority_at_k(a, right(a), k)) == pytest.approx(fresh)  # noqa: B023
        fresh = 1 - (1 - chances["y"]) ** k
        estimate = expected(4, lambda a: pass_at_k(int(sum(right(a))), 4, k))  # noqa: B023
        assert estimate == pytest.approx(fresh)


def test_the_summary_has_problems_as_its_sampling_unit() -> None:
    right = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    answers = [["a"] * 4, ["b"] * 4, ["a", "b", "c", "a"], ["a", "b", "b", "c"]]
    metrics = summarize(right, answers)
    assert metrics["accuracy"] == pytest.approx(7 / 16)
    assert metrics["pass@2"] == pytest.approx((1 + 0 + 5 / 6 + 1 / 2) / 4)
    assert metrics["pass@4"] == 0.75
    assert metrics["majority@4"] == 0.5
    gaps = {2: np.array([0, 0, 1 / 3, 1 / 4]), 4: np.array([0, 0, 1 / 2, 3 / 4])}
    for k, gap in gaps.items():
        assert metrics[f"gap@{k}"] == pytest.approx(gap.mean())
        ends = (metrics[f"gap@{k}/low"], metrics[f"gap@{k}/high"])
        assert ends == pytest.approx(share_interval(gap))
    assert (metrics["low"], metrics["high"]) == share_interval(right.mean(1))
    assert (metrics["pass@4/low"], metrics["pass@4/high"]) == wilson_interval(0.75, 4)
    # more samples of the same problems are not more problems
    repeated_metrics = summarize(np.tile(right, 4), [a * 4 for a in answers])
    assert repeated_metrics["high"] - repeated_metrics["low"] == pytest.approx(
        metrics["high"] - metrics["low"], abs=0.02
    )
    single_metrics = summarize(right[:, :1], [a[:1] for a in answers])
    assert (single_metrics["low"], single_metrics["high"]) == wilson_interval(0.75, 4)
    assert "pass@1" not in single_metrics
    alone = summarize(right[:1], answers[:1])
    assert (alone["low"], alone["high"]) == wilson_interval(1.0, 1)


def evaluation(right: np.ndarray, problem_set: str = "s") -> dict:
    return {"problems": len(right), "outcomes": encode_outcomes(right), "problem_set": problem_set}


def test_comparisons_are_paired() -> None:
    generator = np.random.default_rng(1)
    hard = generator.random((200, 1))
    correct_a, correct_b = (generator.random((200, 1)) < hard * x for x in (0.6, 0.9))
    comparison = compare(evaluation(correct_a), evaluation(correct_b))
    difference = correct_b.mean(1) - correct_a.mean(1)
    assert comparison["gain"] == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / 200**0.5
    assert comparison["low"] == pytest.approx(difference.mean() - half, abs=0.01)
    assert comparison["high"] == pytest.approx(difference.mean() + half, abs=0.01)
    assert (comparison["lost"], comparison["won"]) == (
        (difference < 0).sum(),
        (difference > 0).sum(),
    )
    # a run has no gain over itself, and the interval shows the uncertainty of 200 problems
    self_comparison = compare(evaluation(correct_a), evaluation(correct_a))
    assert (self_comparison["gain"], self_comparison["p"]) == (0, 1)
    assert (self_comparison["low"], self_comparison["high"]) == gain_interval(np.zeros(200))
    correct_c = generator.random((50, 4)) < 0.5
    assert "p" not in compare(evaluation(correct_c), evaluation(correct_c))
    correct_d = generator.random((50, 2)) < 0.7
    comparison = compare(evaluation(correct_c), evaluation(correct_d))
    assert comparison["gain"] == pytest.approx(correct_d.mean() - correct_c.mean())
    expected = gain_interval(correct_d.mean(1) - correct_c.mean(1))
    assert (comparison["low"], comparison["high"]) == expected
    assert (decode_outcomes(evaluation(correct_c)) == correct_c).all()
    assert (decode_outcomes(evaluation(correct_a)) == correct_a).all()
    with pytest.raises(ValueError, match=r"different problems \(200, set s; 200, set t\)"):
        compare(evaluation(correct_a), evaluation(correct_b, "t"))


def test_mcnemar_counts_coin_flips() -> None:
    for n in range(11):
        flips = [sum(x) for x in product((0, 1), repeat=n)]
        for won in range(n + 1):
            as_far = [abs(2 * x - n) >= abs(2 * won - n) for x in flips]
            assert mcnemar(n - won, won) == pytest.approx(np.mean(as_far) if n else 1)
