"""Final accuracies of methods and their paired differences, from a table of evaluations.

All runs of a task are evaluated on the same problems, and runs with the same seed saw the same
prompts. Differences are therefore paired by problem and by seed.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from diagnostics.stats import gain_interval, problem_accuracies, share_interval


def last_evaluations(table: pd.DataFrame) -> pd.DataFrame:
    """Return the last evaluation of every run and task."""
    keys = ["group", "method", "seed", "task"]
    return table.sort_values("step").drop_duplicates(keys, keep="last")


def outcome_matrix(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """Return the (seeds, problems) outcomes of a method from a table of one group and task."""
    method_rows = table.loc[table["method"] == method, ["seed", "outcomes"]].sort_values("seed")
    accuracies = [problem_accuracies(x) for x in method_rows["outcomes"]]
    # one array, because pandas makes a column object of every problem of a list of arrays
    values = np.stack(accuracies) if accuracies else np.empty((0, 0))
    return pd.DataFrame(values, index=method_rows["seed"].to_numpy())


def accuracy_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over (runs, problems) and its 95 % interval over both."""
    return float(values.mean()), *share_interval(values)


def paired_interval(outcomes: pd.DataFrame, baseline_outcomes: pd.DataFrame) -> dict[str, float]:
    """Compute the paired difference of two methods over the seeds that both have.

    Args:
        outcomes: (seeds, problems) outcomes of one method.
        baseline_outcomes: The same of the other method.

    Returns:
        value, low and high: the mean difference with its 95 % interval over seeds and problems.
        seeds: number of common seeds.
    """
    differences = _paired_outcomes(outcomes, baseline_outcomes)
    low, high = gain_interval(differences)
    return {
        "value": float(differences.mean()),
        "low": low,
        "high": high,
        "seeds": len(differences),
    }


def paired_difference(outcomes: pd.DataFrame, baseline_outcomes: pd.DataFrame) -> dict[str, float]:
    """Test the paired difference of two methods over the seeds that both have.

    Args:
        outcomes: (seeds, problems) outcomes of one method.
        baseline_outcomes: The same of the other method.

    Returns:
        value, low, high and seeds: see `paired_interval`.
        p: `sign_flip_test` over problems of differences averaged over seeds, so that it is about
        these runs. p_seeds: over seeds of differences averaged over problems, so that it is about
        runs like them; with n seeds it is at least 2^(1-n).
    """
    differences = _paired_outcomes(outcomes, baseline_outcomes)
    p = sign_flip_test(differences.mean(0), np.random.default_rng(0))
    p_seeds = sign_flip_test(differences.mean(1), np.random.default_rng(0))
    return paired_interval(outcomes, baseline_outcomes) | {"p": p, "p_seeds": p_seeds}


def _paired_outcomes(outcomes: pd.DataFrame, baseline_outcomes: pd.DataFrame) -> np.ndarray:
    """Return the (seeds, problems) differences of the seeds that both methods have."""
    seeds = outcomes.index.intersection(baseline_outcomes.index)
    return outcomes.loc[seeds].to_numpy(float) - baseline_outcomes.loc[seeds].to_numpy(float)


def paired_gain(
    outcomes: pd.DataFrame, baseline_outcomes: pd.DataFrame
) -> tuple[float, float, float]:
    """Return the value of `paired_interval` and the ends of its interval."""
    gain = paired_interval(outcomes, baseline_outcomes)
    return gain["value"], gain["low"], gain["high"]


def interval_columns(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    """Return a value and its interval as the columns NAME, NAME_low and NAME_high."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def sign_flip_test(
    values: np.ndarray, generator: np.random.Generator, num_draws: int = 9999
) -> float:
    """Test whether a mean is 0 under symmetry, by flipping signs.

    All 2^n sign patterns are used if there are at most `num_draws`, otherwise random ones. Random
    patterns are counted together with the observed one, so that p is at least 1 / (num_draws + 1).

    Args:
        values: (n,) differences.
        generator: Random generator of the patterns.
        num_draws: Largest number of patterns.

    Returns:
        The two-sided p value.
    """
    n, threshold = len(values), np.abs(values.sum()) - 1e-12
    if 2**n <= num_draws:
        patterns = np.array(list(itertools.product((1, -1), repeat=n)))
        return float((np.abs(patterns @ values) >= threshold).mean())
    signs = generator.integers(0, 2, size=(num_draws, n)) * 2 - 1
    return float((1 + (np.abs(signs @ values) >= threshold).sum()) / (num_draws + 1))


def holm_adjust(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's method, in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
