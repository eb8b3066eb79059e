"""The discount of least error on the plane of batch size n and KL of a response, kappa T."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.analysis.summary import interval
from synthetic.analysis.tradeoff import optimal_gamma, overtaking_batch
from synthetic.exact import moments
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair

CLAIM = (
    "Where a run stands on the plane of batch size and KL of a response says most of what its best "
    "discount is. Sampled as is, the rest is the horizon: at equal KL a longer response needs a "
    "larger batch before the future pays, about in proportion. With mean costs and a value "
    "baseline the batch alone decides, whatever the KL and the horizon."
)
GAMMAS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
NAMES = ("plain", "position_value", "rb_all_value")
COSTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""kappa T in nats."""
BATCHES = tuple(4**i for i in range(10))
KEYS = ["estimator", "horizon", "cost", "n"]


def _longer(estimator: str, cost: float) -> dict[str, Any]:
    return {"quantity": "longer", "estimator": estimator, "cost": cost}


HEADLINES: dict[str, dict[str, Any]] = {
    "n from which gamma = 1 beats gamma = 0 at 30 nats a response over that at 0.3 nats, sampled "
    "as is: {}": {"quantity": "nearer", "estimator": "plain"},
    "with the mean credit at the position as baseline: {}": {
        "quantity": "nearer",
        "estimator": "position_value",
    },
    "with mean costs and a value baseline: {}": {"quantity": "nearer", "estimator": "rb_all_value"},
    "that n at the longer horizon over that at the 8 times shorter one, both at 0.3 nats, sampled "
    "as is: {}": _longer("plain", 0.3),
    "both at 30 nats: {}": _longer("plain", 30.0),
    "with mean costs and a value baseline, both at 3 nats: {}": _longer("rb_all_value", 3.0),
}


def _settings(draws: int, horizons: tuple[int, ...], size: tuple[int, int]) -> list[dict[str, Any]]:
    shared = dict(zip(("states", "actions"), size, strict=True))
    return [
        {**shared, "horizon": horizon, "heterogeneity": 0.5, "mixing": 0.1, "seed": seed}
        for horizon in horizons
        for seed in range(draws)
    ]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, (8, 64), (3, 2)),
    "quick": _settings(15, (16, 128), (8, 4)),
    "paper": _settings(50, (32, 256), (8, 8)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Relative squared bias and variance of one world, its teacher moved to each of COSTS."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    mdp = random_chain(*shape, generator, setting["mixing"])
    student, teacher = random_pair(mdp, generator, 1.0, setting["heterogeneity"])
    about = {"seed": setting["seed"], "horizon": setting["horizon"]}
    rows = []
    for cost in COSTS:
        there = student + distance(mdp, student, teacher - student, cost) * (teacher - student)
        truth = moments.expected_gradient(mdp, student, there, 1.0)
        means, variances = moments.moments(mdp, student, there, NAMES, GAMMAS)
        unit = truth.square().sum()
        bias2 = (means - truth).square().sum((-1, -2)) / unit
        rows += [
            {**about, "cost": cost, "estimator": name, "gamma": g, "bias2": float(b), "variance": v}
            for name, row_b, row_v in zip(NAMES, bias2, (variances / unit).tolist(), strict=True)
            for g, b, v in zip(GAMMAS, row_b, row_v, strict=True)
        ]
    return rows


def distance(mdp: TabularMDP, student: Tensor, offset: Tensor, cost: float) -> float:
    """The x > 0 at which the teacher student + x offset is `cost` nats a sequence away.

    By bisection; the KL of every state, and with fixed visits of the student the whole, rises in x.

    Raises:
      ValueError: there is none below 1000.
    """
    low, high = 0.0, 1000.0
    if float(moments.sequence_kl(mdp, student, student + high * offset).total) < cost:
        raise InvalidInput(f"no teacher along this offset is {cost} nats a response away")
    for _ in range(60):
        middle = (low + high) / 2
        near = float(moments.sequence_kl(mdp, student, student + middle * offset).total) < cost
        low, high = (middle, high) if near else (low, middle)
    return high


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over worlds by estimator, horizon and cost: `best_gamma`, the discount of least error
    at n; `overtaking_batch`, the n from which gamma = 1 errs less than gamma = 0, 1 at
    least. Over pairs of
    worlds, without horizon: `longer`, that n at the longest horizon over that at the shortest; and
    over worlds of all horizons, `nearer`, that n at 30 nats over that at 0.3. Intervals resample
    worlds.
    """
    found = []
    by = ["horizon", "seed", "cost", "estimator"]
    for key, mine in rows.groupby(by, sort=False):
        mine = mine.sort_values("gamma")
        gammas, bias2, variance = (mine[c].to_numpy() for c in ("gamma", "bias2", "variance"))
        about = dict(zip(by, key, strict=True))
        overtakes = max(1.0, float(overtaking_batch(bias2[0], variance[0], variance[-1])))
        found.append({**about, "overtaking_batch": overtakes})
        for n in BATCHES:
            best = float(optimal_gamma(gammas, bias2, variance, n))
            found.append({**about, "n": n, "best_gamma": best})
    table = pd.DataFrame(found)
    batch = table.dropna(subset=["overtaking_batch"])
    ends = batch.pivot(index=["seed", "cost", "estimator"], columns="horizon")["overtaking_batch"]
    longer = (ends[ends.columns.max()] / ends[ends.columns.min()]).rename("longer").reset_index()
    costs = batch.pivot(index=["horizon", "seed", "estimator"], columns="cost")["overtaking_batch"]
    nearer = (costs[30.0] / costs[0.3]).rename("nearer").reset_index()
    world = nearer["horizon"].astype(str) + "-" + nearer["seed"].astype(str)
    parts = [
        interval(table.dropna(subset=[name]), name, KEYS, np.median)
        for name in ("best_gamma", "overtaking_batch")
    ]
    parts += [interval(longer, "longer", KEYS, np.median)]
    parts += [
        interval(nearer.drop(columns="horizon").assign(seed=world), "nearer", KEYS, np.median)
    ]
    return pd.concat(parts, ignore_index=True)
