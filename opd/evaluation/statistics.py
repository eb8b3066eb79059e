"""Accuracy of repeated samples: avg@k, pass@k, majority@k, their intervals, and paired comparisons.

Shapes: M problems, S samples of each. Problems are the sampling unit of every interval: samples of
one problem say nothing about other problems. `right` is (M, S) bool throughout.
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


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one.

    1 - C(samples - right, k) / C(samples, k): unbiased for the probability that k fresh samples
    do. (Chen et al. 2021, arXiv 2107.03374.)

    Raises:
      ValueError: k is not in 1 .. samples.
    """
    refuse_k(k, samples)
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str | None], right: Sequence[float], k: int) -> float:
    """Expected correctness of the most frequent answer among k of the samples.

    The mean over all subsets of k samples, and in each over a fair draw among the answers tied for
    the most votes; so it is unbiased for majority voting on k fresh samples with random ties. An
    unreadable answer (None) has no vote; where nobody votes the result is 0.

    Args:
      answers: (S,) what each sample votes for.
      right: (S,) its reward; an answer is worth the mean of its samples.

    Raises:
      ValueError: k is not in 1 .. S.
    """
    refuse_k(k, len(answers))
    votes = Counter(answer for answer in answers if answer is not None)
    silent = len(answers) - votes.total()
    worth = {
        answer: float(np.mean([r for a, r in zip(answers, right, strict=True) if a == answer]))
        for answer in votes
    }
    groups = [(count, worth[answer]) for answer, count in votes.items()]
    top = max(votes.values(), default=0)
    total = sum(won_with(groups, silent, k, most) for most in range(1, min(top, k) + 1))
    return total / math.comb(len(answers), k)


def won_with(groups: list[tuple[int, float]], silent: int, k: int, most: int) -> float:
    """Sum over the k-subsets whose winners have `most` votes, of the winners' mean worth.

    groups: (samples, worth) of each answer. Adds one answer at a time; `ways[v, t]` counts the
    choices so far with v samples and t answers that have `most` votes, `value[v, t]` is the sum
    over them of those answers' worth.
    """
    ties = k // most
    ways, value = np.zeros((2, k + 1, ties + 1))
    for chosen in range(min(silent, k) + 1):
        ways[chosen, 0] = math.comb(silent, chosen)
    for count, worth in groups:
        old_ways, old_value = ways, value
        ways, value = np.zeros((2, k + 1, ties + 1))
        for chosen in range(min(count, most - 1, k) + 1):
            weight = math.comb(count, chosen)
            ways[chosen:] += weight * old_ways[: k + 1 - chosen]
            value[chosen:] += weight * old_value[: k + 1 - chosen]
        if count >= most:
            weight = math.comb(count, most)
            before = old_ways[: k + 1 - most, :-1]
            ways[most:, 1:] += weight * before
            value[most:, 1:] += weight * (old_value[: k + 1 - most, :-1] + worth * before)
    return float((value[k, 1:] / np.arange(1, ties + 1)).sum())


def refuse_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise InvalidInput(f"k is {k}, but each problem has {samples} samples; draw at least k")


def summary(right: Array, answers: Sequence[Sequence[str | None]]) -> dict[str, float]:
    """Accuracy, pass@k and majority@k with their 95 % intervals over problems.

    `accuracy` (= avg@S = pass@1), `pass@k` for k = 2, 4, 8, ... and S, and `majority@S`; each with
    `/low` and `/high`, plain `low` and `high` for the accuracy (`diagnostics.stats`). With one
    sample a problem there is only the accuracy, and its interval is Wilson's.

    Args:
      right: (M, S) bool. answers: (M, S), see `majority_at_k`.
    """
    right = np.asarray(right, dtype=bool)
    samples = right.shape[1]
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    columns = {"accuracy": right.mean(1)}
    for k in [*powers, samples] if samples > 1 else ():
        columns[f"pass@{k}"] = np.array([pass_at_k(int(r.sum()), samples, k) for r in right])
    if samples > 1:
        columns[f"majority@{samples}"] = np.array(
            [majority_at_k(a, r, samples) for a, r in zip(answers, right, strict=True)]
        )
    found: dict[str, float] = {}
    for name, values in columns.items():
        low, high = share_interval(values.clip(0, 1))
        prefix = "" if name == "accuracy" else f"{name}/"
        found |= {name: float(values.mean()), f"{prefix}low": low, f"{prefix}high": high}
    return found


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """How much better `b` is than `a` on the same problems, problem by problem.

    `gain`, the difference of the accuracies, with its paired 95 % interval over problems (`low`,
    `high`, of `diagnostics.stats.gain_interval`); it speaks of these two models, not of their
    seeds. With one sample of each problem also `lost` and `won`, the problems that only `a` or
    only `b` got right, and `p`, the exact two-sided McNemar test of equally many.

    Args:
      a, b: results of `opd.evaluation.evaluate.evaluate`, rows of evals.jsonl, or what `opd eval` writes.

    Raises:
      ValueError: different problems.
    """
    if a["problem_set"] != b["problem_set"]:
        raise InvalidInput(
            f"the evaluations are of different problems ({a['problems']}, set {a['problem_set']}; "
            f"{b['problems']}, set {b['problem_set']}); evaluate both on one task"
        )
    before, after = rights(a), rights(b)
    difference = after.mean(1) - before.mean(1)
    low, high = gain_interval(difference)
    found = {"gain": float(difference.mean()), "low": low, "high": high}
    if before.shape[1] == after.shape[1] == 1:
        lost, won = int((difference < 0).sum()), int((difference > 0).sum())
        found |= {"lost": lost, "won": won, "p": mcnemar(lost, won)}
    return found


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of `lost` and `won` discordant pairs under a fair coin; 1 for none.

    (McNemar 1947, in its exact binomial form.)
    """
    n = lost + won
    tail = sum(math.comb(n, i) for i in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**n)


def written(right: Array) -> str:
    """(M, S) bool as text: a digit a sample, with a space between problems if S > 1."""
    between = "" if right.shape[1] == 1 else " "
    return between.join("".join("01"[int(x)] for x in row) for row in right)


def rights(result: dict[str, Any]) -> Array:
    """(M, S) bool from the `outcomes` of an evaluation, as `written`."""
    digits = result["outcomes"].replace(" ", "")
    return np.array([x == "1" for x in digits]).reshape(result["problems"], -1)
