"""Variance by horizon: exponents, polynomial coefficients and their predictions, bounds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from synthetic.analysis.summary import interval, slopes
from synthetic.exact import moments
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair, to_dense
from synthetic.worlds.worst_case import bounds, constant_cost

CLAIM = (
    "In mixing chains the variance of one trajectory's gradient grows linearly at gamma = 0 and "
    "cubically at gamma = 1, with the predicted coefficients; a baseline removes the cubic term. "
    "The published O(T^4) is not tight: O(T^3) is, and constant costs attain it."
)
CURVES = (
    *(("plain", gamma) for gamma in (0.0, 0.5, 0.9, 0.98, 1.0)),
    *((name, 1.0) for name in ("position_value", "value", "optimal", "rb_all", "rb_all_value")),
)
"""Estimator and discount of each curve."""
KEYS = ["world", "estimator", "gamma", "horizon"]
HEADLINES: dict[str, dict[str, Any]] = {
    f"exponent at the longest horizon, mixing chain, {label}: {{}}": {
        "quantity": "last_slope",
        "world": "mixing",
        "estimator": name,
        "gamma": gamma,
    }
    for label, name, gamma in (
        ("gamma = 0", "plain", 0.0),
        ("gamma = 0.9", "plain", 0.9),
        ("gamma = 1", "plain", 1.0),
        ("gamma = 1 with a value baseline", "value", 1.0),
        ("gamma = 1 with the optimal baseline", "optimal", 1.0),
        ("gamma = 1 with mean costs and a value baseline", "rb_all_value", 1.0),
    )
} | {
    "two absorbing classes, gamma = 0: {}": {
        "quantity": "last_slope",
        "world": "absorbing",
        "estimator": "plain",
        "gamma": 0.0,
    },
    "fitted over predicted coefficient of T^3: {}": {"quantity": "cubic_ratio", "distance": 1.0},
    "of T^2: {}": {"quantity": "square_ratio", "distance": 1.0},
    "horizon at which the cubic term dominates, times the mean cost per token: {}": {
        "quantity": "crossover_times_cost",
        "distance": 1.0,
    },
    "the same for a teacher three times closer: {}": {
        "quantity": "crossover_times_cost",
        "distance": 0.3,
    },
    "worst case, largest horizon: variance over R^2 B^2 T^3 is {}": {"quantity": "attained"},
}


def _settings(
    draws: int, shape: tuple[int, int], longest: int, distances: tuple[float, ...]
) -> list[dict[str, Any]]:
    sizes = {"states": shape[0], "actions": shape[1], "longest": longest}
    return [
        {**sizes, "world": world, "distance": distance, "seed": seed}
        for world in ("mixing", "absorbing")
        for distance in (distances if world == "mixing" else distances[:1])
        for seed in range(draws)
    ]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, (3, 2), 32, (1.0, 0.3)),
    "quick": _settings(10, (6, 4), 512, (1.0, 0.3)),
    "paper": _settings(40, (16, 8), 512, (1.0, 0.3, 0.1)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Compute exact variances of one world at horizons 4, 8, ..., and coefficients at gamma = 1."""
    mixing = 1.0 if setting["world"] == "mixing" else 0.0
    longest = random_chain(
        setting["states"], setting["actions"], setting["longest"], generator, mixing
    )
    student, teacher = random_pair(longest, generator, setting["distance"], 0.5)
    labels = {"seed": setting["seed"], "world": setting["world"], "distance": setting["distance"]}
    rows: list[Row] = []
    horizons = [2**i for i in range(2, int(np.log2(setting["longest"])) + 1)]
    for horizon in horizons:
        mdp = replace(longest, horizon=horizon)
        for names, gammas in _grids():
            _, variances = moments.moments(mdp, student, teacher, names, gammas)
            rows += [
                {**labels, "estimator": name, "gamma": g, "horizon": horizon, "variance": float(v)}
                for name, variance in zip(names, variances, strict=True)
                for g, v in zip(gammas, variance, strict=True)
            ]
        tight, published = bounds(mdp, student, teacher, 1.0)
        worst = moments.moments(*constant_cost(horizon), "plain", 1.0)[1]
        rows.append(
            {**labels, "horizon": horizon, "tight": tight, "published": published}
            | {"attained": float(worst) / (0.5 * horizon**3)}
        )
    if setting["world"] == "mixing":
        rows.append({**labels, **coefficients(longest, student, teacher)})
    return rows


def _grids() -> list[tuple[list[str], tuple[float, ...]]]:
    """Return the curves as estimators with equal discounts, which share one pass."""
    by_name: dict[str, tuple[float, ...]] = {}
    for name, gamma in CURVES:
        by_name[name] = (*by_name.get(name, ()), gamma)
    by_gammas: dict[tuple[float, ...], list[str]] = {}
    for name, gammas in by_name.items():
        by_gammas.setdefault(gammas, []).append(name)
    return [(names, gammas) for gammas, names in by_gammas.items()]


def coefficients(mdp: TabularMDP, student: Tensor, teacher: Tensor) -> Row:
    """Compute fitted and predicted coefficients of T^3 and T^2 at gamma = 1 in an ergodic chain.

    The prediction is Var = (kappa^2 s2 / 3) T^3 + (E[delta^2] s2 / 2) T^2 + O(T), with the
    stationary mean cost kappa, s2 = E|s|^2, the TD error delta = r - kappa + h(c') - h(c) and the
    bias function h. It ignores that the first state is not drawn from the stationary distribution
    and that costs depend on scores. The fit to exact values at five horizons is a relative
    least-squares fit that includes the terms T and 1.

    Args:
        mdp: An ergodic chain; its horizon is the longest one fitted.
        student: (S, A) logits.
        teacher: (S, A) logits.

    Returns:
        Fitted over predicted coefficients, the crossover horizon times kappa, and kappa.
    """
    p = mdp.log_policy(student).exp()
    cost = mdp.log_policy(student) - mdp.log_policy(teacher)
    transition = to_dense(mdp).transition
    move = torch.einsum("ca,cad->cd", p, transition)
    local, s = (p * cost).sum(-1), mdp.num_states
    ones_column = torch.ones(s, 1, dtype=torch.float64)
    stationary = torch.linalg.lstsq(
        torch.cat([move.T - torch.eye(s, dtype=torch.float64), ones_column.T]),
        torch.cat([torch.zeros(s, 1, dtype=torch.float64), ones_column[:1]]),
    ).solution[:, 0]
    kappa = float(stationary @ local)
    # Poisson's equation (I - P) h = K - kappa with h orthogonal to the stationary distribution
    fundamental = torch.eye(s, dtype=torch.float64) - move + ones_column * stationary
    h = torch.linalg.solve(fundamental, local - kappa)
    error = cost[..., None] - kappa + h - h[:, None, None]
    delta2 = float((stationary[:, None, None] * p[..., None] * transition * error**2).sum())
    score2 = float(stationary @ (1 - p.square().sum(-1)))
    horizons = np.array([mdp.horizon // 16 * i for i in (4, 6, 8, 12, 16)], dtype=np.float64)
    values = [
        float(moments.moments(replace(mdp, horizon=int(t)), student, teacher, "plain", 1.0)[1])
        for t in horizons
    ]
    design = np.stack([horizons**i for i in (3, 2, 1, 0)], 1) / np.array(values)[:, None]
    cubic, square, *_ = np.linalg.lstsq(design, np.ones(len(values)), rcond=None)[0]
    predicted = kappa**2 * score2 / 3, delta2 * score2 / 2
    return {
        "cubic_ratio": cubic / predicted[0],
        "square_ratio": square / predicted[1],
        "crossover_times_cost": predicted[1] / predicted[0] * kappa,
        "cost": kappa,
    }


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds as medians by world, estimator, gamma and horizon.

    Quantities at the first distance: `variance`; `slope`, its local exponent between neighbouring
    horizons, and `last_slope`; the bounds `tight` and `published` of gamma = 1; `attained`, the
    variance of constant costs over R^2 B^2 T^3, at the longest horizon. By distance: the ratios of
    `coefficients`. Intervals resample worlds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    first = rows[rows["distance"] == rows["distance"].iloc[0]]
    curves = first.dropna(subset=["variance"])
    steps = slopes(curves, "variance", "horizon", ["seed", "world", "estimator", "gamma"])
    last = steps[steps["horizon"] == steps["horizon"].max()]
    parts = [
        interval(curves, "variance", KEYS),
        interval(steps, "slope", KEYS),
        interval(last.assign(last_slope=last["slope"], horizon=np.nan), "last_slope", KEYS),
    ]
    mixing = first[first["world"] == "mixing"]
    bound = mixing.dropna(subset=["tight"])
    parts += [
        interval(bound.drop(columns="estimator"), name, KEYS) for name in ("tight", "published")
    ]
    end = bound[bound["horizon"] == bound["horizon"].max()]
    parts.append(interval(end[["seed", "attained"]], "attained", KEYS))
    fitted = rows.dropna(subset=["cubic_ratio"])
    for name in ("cubic_ratio", "square_ratio", "crossover_times_cost", "cost"):
        parts.append(interval(fitted[["seed", "distance", name]], name, [*KEYS, "distance"]))
    return pd.concat(parts, ignore_index=True)
