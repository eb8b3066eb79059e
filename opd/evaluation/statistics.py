"""Statistics of repeated samples: avg@k, pass@k, majority@k, intervals, and paired comparisons.

Shapes: M problems, S samples of each. Problems are the sampling unit of every interval: samples of
one problem give no information about other problems. `correct` is (M, S) bool throughout.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.stats import gain_interval, share_interval

Array = NDArray[Any]


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Return the probability that k of the samples include a correct one.

    The k samples are drawn without replacement: 1 - C(samples - correct, k) / C(samples, k), which
    is unbiased for the probability that k fresh samples include a correct one. (Chen et al. 2021,
    arXiv 2107.03374.)

    Args:
        num_correct: Number of correct samples.
        num_samples: Number of samples.
        k: Number of samples drawn.

    Returns:
        A probability.

    Raises:
        InvalidInput: k is not in 1 .. num_samples.
    """
    check_k(k, num_samples)
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(answers: Sequence[str | None], correct: Sequence[float], k: int) -> float:
    """Return the expected correctness of the most frequent answer among k of the samples.

    The mean over all subsets of k samples, and in each over a fair draw among the answers tied for
    the most votes; it is therefore unbiased for majority voting on k fresh samples with random
    ties. An unreadable answer (None) has no vote; without any vote the result is 0.

    Args:
        answers: (S,) vote of each sample.
        correct: (S,) its reward; an answer is worth the mean of its samples.
        k: Number of samples that vote.

    Returns:
        Expected correctness.

    Raises:
        InvalidInput: k is not in 1 .. S.
    """
    check_k(k, len(answers))
    votes = Counter(answer for answer in answers if answer is not None)
    num_abstaining = len(answers) - votes.total()
    worth = {
        answer: float(np.mean([r for a, r in zip(answers, correct, strict=True) if a == answer]))
        for answer in votes
    }
    groups = [(count, worth[answer]) for answer, count in votes.items()]
    top = max(votes.values(), default=0)
    total = sum(
        majority_worth_sum(groups, num_abstaining, k, num_votes)
        for num_votes in range(1, min(top, k) + 1)
    )
    return total / math.comb(len(answers), k)


def majority_worth_sum(
    groups: list[tuple[int, float]], num_abstaining: int, k: int, num_votes: int
) -> float:
    """Sum the mean worth of the winners over the k-subsets whose winners have `num_votes` votes.

    Adds one answer at a time. `ways[v, t]` counts the choices so far with v samples and t answers
    that have `num_votes` votes; `value[v, t]` is the sum over them of those answers' worth.

    Args:
        groups: (samples, worth) of each answer.
        num_abstaining: Number of samples without a vote.
        k: Number of samples that vote.
        num_votes: Votes of the winners.

    Returns:
        The sum.
    """
    ties = k // num_votes
    ways, value = np.zeros((2, k + 1, ties + 1))
    for num_drawn in range(min(num_abstaining, k) + 1):
        ways[num_drawn, 0] = math.comb(num_abstaining, num_drawn)
    for count, worth in groups:
        old_ways, old_value = ways, value
        ways, value = np.zeros((2, k + 1, ties + 1))
        for num_drawn in range(min(count, num_votes - 1, k) + 1):
            weight = math.comb(count, num_drawn)
            ways[num_drawn:] += weight * old_ways[: k + 1 - num_drawn]
            value[num_drawn:] += weight * old_value[: k + 1 - num_drawn]
        if count >= num_votes:
            weight = math.comb(count, num_votes)
            previous_ways = old_ways[: k + 1 - num_votes, :-1]
            ways[num_votes:, 1:] += weight * previous_ways
            value[num_votes:, 1:] += weight * (
                old_value[: k + 1 - num_votes, :-1] + worth * previous_ways
            )
    return float((value[k, 1:] / np.arange(1, ties + 1)).sum())


def check_k(k: int, num_samples: int) -> None:
    """Refuse k outside 1 .. num_samples."""
    if not 1 <= k <= num_samples:
        raise InvalidInput(
            f"k is {k}, but each problem has {num_samples} samples; sample at least k"
        )


def summarize(correct: Array, answers: Sequence[Sequence[str | None]]) -> dict[str, float]:
    """Return accuracy, pass@k and majority@k with their 95 % intervals over problems.

    `accuracy` (= avg@S = pass@1), `pass@k` for k = 2, 4, 8, ... and S, `gap@k`, which is pass@k -
    pass@1, and `majority@S`; each with `/low` and `/high`, plain `low` and `high` for the accuracy
    (`diagnostics.stats`). The interval of a gap is paired: it is that of the mean of the problems'
    own gaps, none of which is negative. With one sample per problem there is only the accuracy,
    and its interval is Wilson's.

    Args:
        correct: (M, S) bool.
        answers: (M, S) votes, see `majority_at_k`.

    Returns:
        Metrics by name.
    """
    correct = np.asarray(correct, dtype=bool)
    num_samples = correct.shape[1]
    powers = [2**i for i in range(1, num_samples.bit_length()) if 2**i < num_samples]
    columns = {"accuracy": correct.mean(1)}
    for k in [*powers, num_samples] if num_samples > 1 else ():
        columns[f"pass@{k}"] = np.array([pass_at_k(int(r.sum()), num_samples, k) for r in correct])
        columns[f"gap@{k}"] = columns[f"pass@{k}"] - columns["accuracy"]
    if num_samples > 1:
        columns[f"majority@{num_samples}"] = np.array(
            [majority_at_k(a, r, num_samples) for a, r in zip(answers, correct, strict=True)]
        )
    metrics: dict[str, float] = {}
    for name, values in columns.items():
        low, high = share_interval(values.clip(0, 1))
        prefix = "" if name == "accuracy" else f"{name}/"
        metrics |= {name: float(values.mean()), f"{prefix}low": low, f"{prefix}high": high}
    return metrics


def ratio_values(sums: Array, counts: Array) -> Array:
    """Return one value per problem, whose mean is the ratio of the totals of the problems.

    With R = sum(sums) / sum(counts) the value of a problem is R + (sums - R counts) / mean(counts):
    the ratio, linearised in what its problem contributes. (Cochran 1977, Sampling Techniques, 6.3.)
    Where all problems count equally, it is the problem's own ratio.

    Args:
        sums: (M,) sum of a quantity over the responses to each problem.
        counts: (M,) number of these responses, at least one of them above 0.

    Returns:
        (M,) values.
    """
    ratio = sums.sum() / counts.sum()
    return np.asarray(ratio + (sums - ratio * counts) / counts.mean())


def mean_interval(values: Array, lowest: float = -1.0, highest: float = 1.0) -> tuple[float, float]:
    """Compute a 95 % interval of a mean of `ratio_values`; never degenerate.

    `diagnostics.stats.gain_interval` in units of the largest value, if that exceeds 1: a problem
    with more responses than the others counts more.

    Args:
        values: (M,) values.
        lowest: Smallest possible mean.
        highest: Largest possible mean.

    Returns:
        (low, high).
    """
    unit = max(1.0, float(np.abs(values).max()))
    low, high = gain_interval(values / unit)
    return max(lowest, unit * low), min(highest, unit * high)


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """Return how much better `b` is than `a` on the same problems, problem by problem.

    `gain` is the difference of the accuracies, with its paired 95 % interval over problems (`low`,
    `high`, of `diagnostics.stats.gain_interval`). It is about these two models, not about their
    seeds. With one sample per problem there are also `lost` and `won`, the problems that only `a`
    or only `b` solved, and `p`, the exact two-sided McNemar test of equal numbers.

    Args:
        a: Result of `opd.evaluation.evaluate.evaluate`, a row of evals.jsonl, or the output of `opd
            eval`.
        b: The same of the other model.

    Returns:
        Metrics by name.

    Raises:
        InvalidInput: The problems differ.
    """
    if a["problem_set"] != b["problem_set"]:
        raise InvalidInput(
            f"the evaluations used different problems ({a['problems']}, set {a['problem_set']}; "
            f"{b['problems']}, set {b['problem_set']}); evaluate both on the same task"
        )
    correct_a, correct_b = decode_outcomes(a), decode_outcomes(b)
    difference = correct_b.mean(1) - correct_a.mean(1)
    low, high = gain_interval(difference)
    comparison = {"gain": float(difference.mean()), "low": low, "high": high}
    if correct_a.shape[1] == correct_b.shape[1] == 1:
        num_lost, num_won = int((difference < 0).sum()), int((difference > 0).sum())
        comparison |= {"lost": num_lost, "won": num_won, "p": mcnemar(num_lost, num_won)}
    return comparison


def mcnemar(num_lost: int, num_won: int) -> float:
    """Return the exact two-sided p-value of discordant pairs under a fair coin.

    (McNemar 1947, in its exact binomial form.)

    Args:
        num_lost: Pairs in favour of the first model.
        num_won: Pairs in favour of the second model.

    Returns:
        The p-value; 1 without discordant pairs.
    """
    n = num_lost + num_won
    tail = sum(math.comb(n, i) for i in range(min(num_lost, num_won) + 1))
    return min(1.0, 2 * tail / 2**n)


def encode_outcomes(correct: Array) -> str:
    """Format (M, S) bool as text: one digit per sample, a space between problems if S > 1."""
    separator = "" if correct.shape[1] == 1 else " "
    return separator.join("".join("01"[int(x)] for x in row) for row in correct)


def decode_outcomes(result: dict[str, Any]) -> Array:
    """Parse the `outcomes` of an evaluation, as written by `encode_outcomes`, to (M, S) bool."""
    digits = result["outcomes"].replace(" ", "")
    return np.array([x == "1" for x in digits]).reshape(result["problems"], -1)
