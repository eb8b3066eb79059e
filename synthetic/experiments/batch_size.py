"""The discount of least error against batch size, by variance reduction and teacher distance."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.analysis.tradeoff import mse, optimal_gamma, overtaking_batch
from synthetic.exact import moments
from synthetic.worlds.mdp import random_chain, random_pair

CLAIM = (
    "That gamma = 0 is best is a statement about batch size and missing variance reduction, not a "
    "law: the discount of least error rises with the batch, sooner with a baseline and mean costs, "
    "and later the nearer the teacher, since the bias falls faster than the noise."
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


def _overtakes(estimator: str, distance: float) -> dict[str, Any]:
    return {"quantity": "overtaking_batch", "estimator": estimator, "distance": distance}


HEADLINES: dict[str, dict[str, Any]] = {
    "best discount at n = 1, sampled as is: {}": _best("plain", 1),
    "at n = 256: {}": _best("plain", 256),
    "at n = 65536: {}": _best("plain", 65536),
    "best discount at n = 1, mean costs and value baseline: {}": _best("rb_all_value", 1),
    "the same at n = 256: {}": _best("rb_all_value", 256),
    "gamma = 1 overtakes gamma = 0, sampled as is, at n = {}": _overtakes("plain", 1.0),
    "with a leave-one-out baseline of 8 rollouts: {}": _overtakes("leave_one_out", 1.0),
    "with the optimal baseline: {}": _overtakes("optimal", 1.0),
    "with mean costs and a value baseline: {}": _overtakes("rb_all_value", 1.0),
    "sampled as is, teacher ten times nearer: {}": _overtakes("plain", 0.1),
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
    shared = dict(zip(("states", "actions", "horizon"), shape, strict=True))
    return [
        {**shared, "heterogeneity": 0.5, "mixing": 0.1, "distance": distance, "seed": seed}
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
    """Squared bias and variance relative to |grad J|^2, of every estimator and discount."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    mdp = random_chain(*shape, generator, setting["mixing"])
    student, teacher = random_pair(mdp, generator, setting["distance"], setting["heterogeneity"])
    truth = moments.expected_gradient(mdp, student, teacher, 1.0)
    means, variances = moments.moments(mdp, student, teacher, NAMES, GAMMAS, group=GROUP)
    bias2 = (means - truth).square().sum((-1, -2)) / truth.square().sum()
    variances = variances / truth.square().sum()
    about = {"seed": setting["seed"], "distance": setting["distance"]}
    return [
        {**about, "estimator": name, "gamma": gamma, "bias2": float(b), "variance": float(v)}
        for name, row_b, row_v in zip(NAMES, bias2, variances, strict=True)
        for gamma, b, v in zip(GAMMAS, row_b, row_v, strict=True)
    ]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over worlds by estimator, distance and n: `best_gamma`, the discount of least error;
    `gain`, its error over that of gamma = 0; and `overtaking_batch`, the n from which gamma = 1
    errs less than gamma = 0, without n. Intervals resample worlds.
    """
    found = []
    for (seed, distance, name), mine in rows.groupby(["seed", "distance", "estimator"], sort=False):
        mine = mine.sort_values("gamma")
        gammas, bias2, variance = (mine[c].to_numpy() for c in ("gamma", "bias2", "variance"))
        about = {"seed": seed, "distance": distance, "estimator": name}
        overtakes = float(overtaking_batch(bias2[0], variance[0], variance[-1]))
        found.append({**about, "overtaking_batch": overtakes})
        for n in BATCHES:
            error = mse(bias2, variance, n)
            best = float(optimal_gamma(gammas, bias2, variance, n))
            gain = float(error.min() / error[0])
            found.append({**about, "n": n, "best_gamma": best, "gain": gain})
    table = pd.DataFrame(found)
    return pd.concat(
        [
            interval(table.dropna(subset=[name]), name, KEYS, np.median)
            for name in ("overtaking_batch", "best_gamma", "gain")
        ],
        ignore_index=True,
    )
