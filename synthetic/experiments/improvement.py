"""How much one step lowers the sequence KL, by discount and batch, each at its best step size."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.analysis.tradeoff import best_improvement
from synthetic.exact import curvature
from synthetic.worlds.mdp import random_chain, random_pair

CLAIM = (
    "Judged by how much one step of descent lowers the sequence KL, not by squared error, "
    "gamma = 0 loses nothing by its bias: in most worlds (their students can be their teachers) it "
    "lowers J more than the exact gradient does, however large the batch, and noise leaves "
    "gamma = 1 far behind in small ones. Squared error alone overstates what the future is worth."
)
GAMMAS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
NAMES = ("plain", "value", "rb_all", "rb_all_value")
BATCHES = tuple(4**i for i in range(10))
KEYS = ["estimator", "distance", "gamma", "n"]


def _share(estimator: str, gamma: float, n: int) -> dict[str, Any]:
    where = {"estimator": estimator, "distance": 0.7, "gamma": gamma, "n": n}
    return {"quantity": "share", **where}


def _by(quantity: str, estimator: str, **where: Any) -> dict[str, Any]:
    return {"quantity": quantity, "estimator": estimator, "distance": 0.7, **where}


HEADLINES: dict[str, dict[str, Any]] = {
    "decrease of J by gamma = 0 over that of the exact gradient, as sampled, n = 16: {}": _share(
        "plain", 0.0, 16
    ),
    "by gamma = 1, as sampled, n = 16: {}": _share("plain", 1.0, 16),
    "by gamma = 1, mean costs and value baseline, n = 16: {}": _share("rb_all_value", 1.0, 16),
    "by gamma = 0, as sampled, n = 65536: {}": _share("plain", 0.0, 65536),
    "discount of the largest decrease, as sampled, n = 256: {}": _by("best_gamma", "plain", n=256),
    "n = 65536: {}": _by("best_gamma", "plain", n=65536),
    "share of worlds in which gamma = 1 never overtakes gamma = 0: {}": _by("never", "plain"),
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
    "smoke": _settings(3, (3, 2, 8), (0.7, 0.3)),
    "quick": _settings(20, (8, 4, 64), (0.1, 0.3, 0.7)),
    "paper": _settings(50, (12, 6, 256), (0.1, 0.3, 0.7)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Slope, curvature and noise of every estimator and discount, and of the exact gradient."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    mdp = random_chain(*shape, generator, setting["mixing"])
    pair = random_pair(mdp, generator, setting["distance"], setting["heterogeneity"])
    found = curvature.step(mdp, *pair, NAMES, GAMMAS)
    about = {"seed": setting["seed"], "distance": setting["distance"]}
    return [
        {**about, "estimator": name, "gamma": gamma}
        | {k: float(x[i, j]) for k, x in vars(found).items()}
        for i, name in enumerate(NAMES)
        for j, gamma in enumerate(GAMMAS)
    ]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Over worlds, by estimator and distance: median `share`, the best decrease of J in units of
    the exact gradient's, by discount and n; median `best_gamma` by n; `never`, the share of worlds
    in which gamma = 0 lowers J more than gamma = 1 however large the batch; `unbounded`, the share
    of worlds left out of the others because J curves down along a step. Intervals resample worlds.
    """
    found = []
    for (seed, distance, name), mine in rows.groupby(["seed", "distance", "estimator"], sort=False):
        mine = mine.sort_values("gamma")
        columns = (mine[c].to_numpy() for c in ("gamma", "slope", "curvature", "noise"))
        gammas, slope, bend, noise = columns
        limit = best_improvement(
            slope, bend, noise, np.inf
        )  # gamma = 1 is the exact gradient there
        about = {"seed": seed, "distance": distance, "estimator": name}
        bounded = all(
            np.isfinite(best_improvement(slope, bend, noise, n)).all() for n in (1, np.inf)
        )
        found.append({**about, "unbounded": float(not bounded)})
        if not bounded:
            continue
        found.append({**about, "never": float(limit[0] > limit[-1])})
        for n in BATCHES:
            share = best_improvement(slope, bend, noise, n) / limit[-1]
            found.append({**about, "n": n, "best_gamma": float(gammas[share.argmax()])})
            found += [
                {**about, "n": n, "gamma": float(g), "share": float(x)}
                for g, x in zip(gammas, share, strict=True)
            ]
    table = pd.DataFrame(found)
    statistics: dict[str, Any] = {"share": np.median, "best_gamma": np.median, "never": np.mean}
    return pd.concat(
        [
            interval(mine, name, KEYS, statistic)
            for name, statistic in (statistics | {"unbounded": np.mean}).items()
            # estimators and distances may have lost different worlds
            for _, mine in table.dropna(subset=[name]).groupby(["estimator", "distance"])
        ],
        ignore_index=True,
    )
