"""Decrease of the sequence KL by one step, by discount and batch size, at the best step size."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.analysis.tradeoff import best_improvement
from synthetic.exact import curvature
from synthetic.worlds.mdp import random_chain, random_pair

CLAIM = (
    "Measured by how much one step of descent lowers the sequence KL instead of squared error, "
    "gamma = 0 loses nothing by its bias: in most worlds (where the student can represent the "
    "teacher) it lowers J more than the exact gradient at any batch size, and at small batches "
    "noise makes gamma = 1 much worse. Squared error overestimates the value of future costs."
)
GAMMAS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
NAMES = ("plain", "value", "rb_all", "rb_all_value")
BATCHES = tuple(4**i for i in range(10))
KEYS = ["estimator", "distance", "gamma", "n"]


def _share_keys(estimator: str, gamma: float, n: int) -> dict[str, Any]:
    keys = {"estimator": estimator, "distance": 0.7, "gamma": gamma, "n": n}
    return {"quantity": "share", **keys}


def _row_keys(quantity: str, estimator: str, **keys: Any) -> dict[str, Any]:
    return {"quantity": quantity, "estimator": estimator, "distance": 0.7, **keys}


HEADLINES: dict[str, dict[str, Any]] = {
    "decrease of J by gamma = 0 over the exact gradient's, as sampled, n = 16: {}": _share_keys(
        "plain", 0.0, 16
    ),
    "by gamma = 1, as sampled, n = 16: {}": _share_keys("plain", 1.0, 16),
    "by gamma = 1, mean costs and value baseline, n = 16: {}": _share_keys("rb_all_value", 1.0, 16),
    "by gamma = 0, as sampled, n = 65536: {}": _share_keys("plain", 0.0, 65536),
    "discount of the largest decrease, as sampled, n = 256: {}": _row_keys(
        "best_gamma", "plain", n=256
    ),
    "n = 65536: {}": _row_keys("best_gamma", "plain", n=65536),
    "share of worlds in which gamma = 0 is better than gamma = 1 at any batch size: {}": _row_keys(
        "never", "plain"
    ),
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
    "smoke": _settings(3, (3, 2, 8), (0.7, 0.3)),
    "quick": _settings(20, (8, 4, 64), (0.1, 0.3, 0.7)),
    "paper": _settings(50, (12, 6, 256), (0.1, 0.3, 0.7)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Compute slope, curvature and noise of every estimator and discount."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    mdp = random_chain(*shape, generator, setting["mixing"])
    pair = random_pair(mdp, generator, setting["distance"], setting["heterogeneity"])
    effects = curvature.step_effect(mdp, *pair, NAMES, GAMMAS)
    labels = {"seed": setting["seed"], "distance": setting["distance"]}
    return [
        {**labels, "estimator": name, "gamma": gamma}
        | {k: float(x[i, j]) for k, x in vars(effects).items()}
        for i, name in enumerate(NAMES)
        for j, gamma in enumerate(GAMMAS)
    ]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds, by estimator and distance.

    Median `share`, the best decrease of J relative to that of the exact gradient, by discount and
    n; median `best_gamma` by n; `never`, the fraction of worlds in which gamma = 0 lowers J more
    than gamma = 1 at any batch size; `unbounded`, the fraction of worlds excluded from the others
    because J curves down along a step. Intervals resample worlds.

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
        columns = (group_rows[c].to_numpy() for c in ("gamma", "slope", "curvature", "noise"))
        gammas, slope, curvatures, noise = columns
        limit = best_improvement(
            slope, curvatures, noise, np.inf
        )  # gamma = 1 is the exact gradient there
        labels = {"seed": seed, "distance": distance, "estimator": name}
        bounded = all(
            np.isfinite(best_improvement(slope, curvatures, noise, n)).all() for n in (1, np.inf)
        )
        records.append({**labels, "unbounded": float(not bounded)})
        if not bounded:
            continue
        records.append({**labels, "never": float(limit[0] > limit[-1])})
        for n in BATCHES:
            share = best_improvement(slope, curvatures, noise, n) / limit[-1]
            records.append({**labels, "n": n, "best_gamma": float(gammas[share.argmax()])})
            records += [
                {**labels, "n": n, "gamma": float(g), "share": float(x)}
                for g, x in zip(gammas, share, strict=True)
            ]
    table = pd.DataFrame(records)
    statistics: dict[str, Any] = {"share": np.median, "best_gamma": np.median, "never": np.mean}
    return pd.concat(
        [
            interval(group_rows, name, KEYS, statistic)
            for name, statistic in (statistics | {"unbounded": np.mean}).items()
            # the excluded worlds may differ between estimators and distances
            for _, group_rows in table.dropna(subset=[name]).groupby(["estimator", "distance"])
        ],
        ignore_index=True,
    )
