"""Discount of least error by batch size n and KL per response, kappa T."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.analysis.summary import interval
from synthetic.analysis.tradeoff import crossover_batch_size, optimal_gamma
from synthetic.exact import moments
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair

CLAIM = (
    "Batch size and KL per response largely determine the best discount. Sampled as is, it also "
    "depends on the horizon: at equal KL, a longer response needs a proportionally larger batch "
    "before future costs help. With mean costs and a value baseline, the batch size alone "
    "determines it, at any KL and horizon."
)
GAMMAS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
NAMES = ("plain", "position_value", "rb_all_value")
COSTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""KL per response, kappa T, in nats."""
BATCHES = tuple(4**i for i in range(10))
KEYS = ["estimator", "horizon", "cost", "n"]


def _longer(estimator: str, cost: float) -> dict[str, Any]:
    return {"quantity": "longer", "estimator": estimator, "cost": cost}


HEADLINES: dict[str, dict[str, Any]] = {
    "crossover batch size of gamma = 1 over gamma = 0 at 30 nats per response relative to 0.3 "
    "nats, sampled as is: {}": {"quantity": "nearer", "estimator": "plain"},
    "with the mean credit at the position as baseline: {}": {
        "quantity": "nearer",
        "estimator": "position_value",
    },
    "with mean costs and a value baseline: {}": {"quantity": "nearer", "estimator": "rb_all_value"},
    "crossover batch size at the longer horizon relative to the 8 times shorter one, both at 0.3 "
    "nats, sampled as is: {}": _longer("plain", 0.3),
    "both at 30 nats: {}": _longer("plain", 30.0),
    "with mean costs and a value baseline, both at 3 nats: {}": _longer("rb_all_value", 3.0),
}


def _settings(draws: int, horizons: tuple[int, ...], size: tuple[int, int]) -> list[dict[str, Any]]:
    sizes = dict(zip(("states", "actions"), size, strict=True))
    return [
        {**sizes, "horizon": horizon, "heterogeneity": 0.5, "mixing": 0.1, "seed": seed}
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
    """Compute relative squared bias and variance of one world, its teacher at each of COSTS."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    mdp = random_chain(*shape, generator, setting["mixing"])
    student, teacher = random_pair(mdp, generator, 1.0, setting["heterogeneity"])
    labels = {"seed": setting["seed"], "horizon": setting["horizon"]}
    rows = []
    for cost in COSTS:
        scaled_teacher = student + teacher_scale(mdp, student, teacher - student, cost) * (
            teacher - student
        )
        truth = moments.expected_gradient(mdp, student, scaled_teacher, 1.0)
        means, variances = moments.moments(mdp, student, scaled_teacher, NAMES, GAMMAS)
        squared_norm = truth.square().sum()
        bias2 = (means - truth).square().sum((-1, -2)) / squared_norm
        rows += [
            {
                **labels,
                "cost": cost,
                "estimator": name,
                "gamma": g,
                "bias2": float(b),
                "variance": v,
            }
            for name, row_b, row_v in zip(
                NAMES, bias2, (variances / squared_norm).tolist(), strict=True
            )
            for g, b, v in zip(GAMMAS, row_b, row_v, strict=True)
        ]
    return rows


def teacher_scale(mdp: TabularMDP, student: Tensor, offset: Tensor, cost: float) -> float:
    """Find x > 0 such that the teacher student + x offset is at `cost` nats per sequence.

    Solved by bisection: the KL of every state, and with the student's fixed visits the total,
    increases with x.

    Args:
        mdp: The world.
        student: (S, A) logits.
        offset: (S, A) direction of the teacher's logits.
        cost: KL per sequence in nats.

    Returns:
        The scale x.

    Raises:
        InvalidInput: If there is none below 1000.
    """
    student_logp = mdp.log_policy(student)
    # the teacher changes no visits of the student, so that they are computed once
    visits = moments.sequence_kl(mdp, student, student).occupancy.sum(0) * mdp.active
    joint = visits[:, None] * student_logp.exp()

    def kl(scale: float) -> float:
        return float((joint * (student_logp - mdp.log_policy(student + scale * offset))).sum())

    low, high = 0.0, 1000.0
    if kl(high) < cost:
        raise InvalidInput(
            f"no teacher along this offset has a KL of {cost} nats per response; use a smaller cost"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < cost else (low, middle)
    return high


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds as medians by estimator, horizon and cost.

    `best_gamma` is the discount of least error at n; `overtaking_batch` the crossover batch size
    from which gamma = 1 errs less than gamma = 0, at least 1. Over pairs of worlds, without
    horizon: `longer`, the crossover batch size at the longest horizon over that at the shortest.
    Over worlds of all horizons: `nearer`, the crossover batch size at 30 nats over that at 0.3.
    Intervals resample worlds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    records = []
    group_columns = ["horizon", "seed", "cost", "estimator"]
    for key, group_rows in rows.groupby(group_columns, sort=False):
        group_rows = group_rows.sort_values("gamma")
        gammas, bias2, variance = (group_rows[c].to_numpy() for c in ("gamma", "bias2", "variance"))
        labels = dict(zip(group_columns, key, strict=True))
        crossover = max(1.0, float(crossover_batch_size(bias2[0], variance[0], variance[-1])))
        records.append({**labels, "overtaking_batch": crossover})
        for n in BATCHES:
            best = float(optimal_gamma(gammas, bias2, variance, n))
            records.append({**labels, "n": n, "best_gamma": best})
    table = pd.DataFrame(records)
    crossovers = table.dropna(subset=["overtaking_batch"])
    by_horizon = crossovers.pivot(index=["seed", "cost", "estimator"], columns="horizon")[
        "overtaking_batch"
    ]
    length_ratio = (
        (by_horizon[by_horizon.columns.max()] / by_horizon[by_horizon.columns.min()])
        .rename("longer")
        .reset_index()
    )
    by_cost = crossovers.pivot(index=["horizon", "seed", "estimator"], columns="cost")[
        "overtaking_batch"
    ]
    kl_ratio = (by_cost[30.0] / by_cost[0.3]).rename("nearer").reset_index()
    world = kl_ratio["horizon"].astype(str) + "-" + kl_ratio["seed"].astype(str)
    parts = [
        interval(table.dropna(subset=[name]), name, KEYS, np.median)
        for name in ("best_gamma", "overtaking_batch")
    ]
    parts += [interval(length_ratio, "longer", KEYS, np.median)]
    parts += [
        interval(kl_ratio.drop(columns="horizon").assign(seed=world), "nearer", KEYS, np.median)
    ]
    return pd.concat(parts, ignore_index=True)
