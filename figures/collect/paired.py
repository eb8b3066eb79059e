"""Final accuracies of methods and their paired differences, from a table of evaluations.

Every run of a task is judged on the same problems, and the runs of one seed saw the same prompts,
so that differences are taken problem by problem and seed by seed.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from diagnostics.records.run_tables import digits
from diagnostics.stats import gain_interval, share_interval


def last(table: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of every run and task."""
    keys = ["group", "method", "seed", "task"]
    return table.sort_values("step").groupby(keys, dropna=False).tail(1)


def outcomes(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """(seeds, problems) outcomes of a method's runs in a table of one group and task."""
    mine = table[table["method"] == method].sort_values("seed")
    return pd.DataFrame([digits(x) for x in mine["outcomes"]], index=mine["seed"].to_numpy())


def accuracy(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over (runs, problems) and its 95 % interval over both."""
    return float(values.mean()), *share_interval(values)


def difference(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, float]:
    """Paired difference over the seeds that both have: value, low, high, p, p_seeds, seeds.

    low, high: 95 %, over seeds and problems. p: `sign_flip` over problems, of differences
    averaged over seeds, so that it is about these runs; p_seeds: over seeds, of differences
    averaged over problems, so that it is about runs like them; with n seeds it is at least 2^(1-n).
    """
    seeds = ours.index.intersection(theirs.index)
    away = ours.loc[seeds].to_numpy(float) - theirs.loc[seeds].to_numpy(float)
    low, high = gain_interval(away)
    p = sign_flip(away.mean(0), np.random.default_rng(0))
    p_seeds = sign_flip(away.mean(1), np.random.default_rng(0))
    tests = {"p": p, "p_seeds": p_seeds, "seeds": len(seeds)}
    return {"value": float(away.mean()), "low": low, "high": high} | tests


def sign_flip(values: np.ndarray, generator: np.random.Generator, draws: int = 9999) -> float:
    """Two-sided p of a mean of 0 under symmetry: how often signs give as large a mean.

    All 2^n patterns of signs where they are at most `draws`, else random ones; of these the drawn
    patterns and the observed one count, so that p is at least 1 / (draws + 1).
    """
    n, least = len(values), np.abs(values.sum()) - 1e-12
    if 2**n <= draws:
        patterns = np.array(list(itertools.product((1, -1), repeat=n)))
        return float((np.abs(patterns @ values) >= least).mean())
    signs = generator.integers(0, 2, size=(draws, n)) * 2 - 1
    return float((1 + (np.abs(signs @ values) >= least).sum()) / (draws + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    found, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = largest
    return found
