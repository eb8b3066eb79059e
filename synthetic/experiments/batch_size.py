"""Discount of least error by batch size, baseline and distance to the teacher."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.analysis.tradeoff import crossover_batch_size, mse, optimal_gamma
from synthetic.exact import moments
from synthetic.worlds.mdp import random_chain, random_pair

CLAIM = (
    "Whether gamma = 0 is best depends on the batch size and on variance reduction. The discount "
    "of least error rises with the batch size: at smaller batches with a baseline and mean costs, "
    "and at larger ones the closer the teacher, since the bias falls faster than the noise."
)
GAMMAS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
NAMES = (
    "plain",
    "position_value",
    "leave_one_out",
    "value",
    "optimal",
    "rb_future",
    "rb_all_value",
)
GROUP = 8
BATCHES = tuple(4**i for i in range(10))
KEYS = ["estimator", "distance", "n"]


def _best(estimator: str, n: int) -> dict[str, Any]:
    return {"quantity": "best_gamma", "estimator": estimator, "distance": 1.0, "n": n}


def _crossover(estimator: str, distance: float) -> dict[str, Any]:
    return {"quantity": "overtaking_batch", "estimator": estimator, "distance": distance}


HEADLINES: dict[str, dict[str, Any]] = {
    "best discount at n = 1, sampled as is: {}": _best("plain", 1),
    "at n = 256: {}": _best("plain", 256),
    "at n = 65536: {}": _best("plain", 65536),
    "best discount at n = 1, mean costs and value baseline: {}": _best("rb_all_value", 1),
    "the same at n = 256: {}": _best("rb_all_value", 256),
    "crossover batch size of gamma = 1 over gamma = 0, sampled as is: n = {}": _crossover(
        "plain", 1.0
    ),
    "with a leave-one-out baseline of 8 rollouts: {}": _crossover("leave_one_out", 1.0),
    "with the optimal baseline: {}": _crossover("optimal", 1.0),
    "with mean costs and a value baseline: {}": _crossover("rb_all_value", 1.0),
    "sampled as is, teacher ten times closer: {}": _crossover("plain", 0.1),
    "error of the best discount over that of gamma = 0, sampled as is, n = 4096: {}": {
        "quantity": "gain",
        "estimator": "plain",
        "distance": 1.0,
        "n": 4096,
    },
}


def _settings(
    draws: int, shape: tuple[int, int, int], distances: tuple[float, ...]
) -> list[dict[str, Any]]:
    sizes = dict(zip(("states", "actions", "horizon"), shape, strict=True))
    return [
        {**sizes, "heterogeneity": 0.5, "mixing": 0.1, "distance": distance, "seed": seed}
        for distance in distances
        for seed in range(draws)
    ]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, (3, 2, 8), (1.0, 0.1)),
    "quick": _settings(20, (8, 4, 64), (0.1, 0.3, 1.0, 2.0)),
    "paper": _settings(50, (16, 8, 256), (0.1, 0.3, 1.0, 2.0)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Compute squared bias and variance relative to |grad J|^2, of every estimator and discount."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    mdp = random_chain(*shape, generator, setting["mixing"])
    student, teacher = random_pair(mdp, generator, setting["distance"], setting["heterogeneity"])
    truth = moments.expected_gradient(mdp, student, teacher, 1.0)
    means, variances = moments.moments(mdp, student, teacher, NAMES, GAMMAS, group=GROUP)
    bias2 = (means - truth).square().sum((-1, -2)) / truth.square().sum()
    variances = variances / truth.square().sum()
    labels = {"seed": setting["seed"], "distance": setting["distance"]}
    return [
        {**labels, "estimator": name, "gamma": gamma, "bias2": float(b), "variance": float(v)}
        for name, row_b, row_v in zip(NAMES, bias2, variances, strict=True)
        for gamma, b, v in zip(GAMMAS, row_b, row_v, strict=True)
    ]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds by estimator, distance and batch size n, as medians.

    Quantities: `best_gamma`, the discount of least error; `gain`, its error over that of gamma = 0;
    and `overtaking_batch` (without n), the batch size from which gamma = 1 errs less than gamma =
    0. Intervals resample worlds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    records = []
    for (seed, distance, name), group_rows in rows.groupby(
        ["seed", "distance", "estimator"], sort=False
    ):
        group_rows = group_rows.sort_values("gamma")
        gammas, bias2, variance = (group_rows[c].to_numpy() for c in ("gamma", "bias2", "variance"))
        labels = {"seed": seed, "distance": distance, "estimator": name}
        crossover = float(crossover_batch_size(bias2[0], variance[0], variance[-1]))
        records.append({**labels, "overtaking_batch": crossover})
        for n in BATCHES:
            error = mse(bias2, variance, n)
            best = float(optimal_gamma(gammas, bias2, variance, n))
            gain = float(error.min() / error[0])
            records.append({**labels, "n": n, "best_gamma": best, "gain": gain})
    table = pd.DataFrame(records)
    return pd.concat(
        [
            interval(table.dropna(subset=[name]), name, KEYS, np.median)
            for name in ("overtaking_batch", "best_gamma", "gain")
        ],
        ignore_index=True,
    )
