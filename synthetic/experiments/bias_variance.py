"""Bias, variance and mean squared error of the gamma family by discount, horizon and batch size."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from opd.objectives import factory
from synthetic.analysis.summary import interval, slopes
from synthetic.analysis.tradeoff import crossover_batch_size, mse
from synthetic.exact import moments
from synthetic.sampling.monte_carlo import monte_carlo
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair
from synthetic.worlds.worst_case import bounds

CLAIM = (
    "Discounting future costs (gamma < 1) trades bias for variance and helps for small batches "
    "only; value baselines and mean costs shift the crossover batch size of gamma = 1 by orders of "
    "magnitude. The variance of gamma = 1 grows at most as T^3, below the published bound of T^4."
)
_CROSSOVER = {"quantity": "overtaking_batch"}
HEADLINES: dict[str, dict[str, Any]] = {
    "sampled as is, gamma = 1 errs less than gamma = 0 from n = {} trajectories": {
        **_CROSSOVER,
        "estimator": "plain",
    },
    "with a value baseline, from n = {}": {**_CROSSOVER, "estimator": "value"},
    "with mean costs alone, from n = {}": {**_CROSSOVER, "estimator": "rb_all"},
    "with mean costs and a value baseline, from n = {}": {
        **_CROSSOVER,
        "estimator": "rb_all_value",
    },
    "the discount of least error for n = 1, sampled as is: {}": {
        "quantity": "best_gamma",
        "estimator": "plain",
        "n": 1,
    },
    "the same for n = 4096: {}": {"quantity": "best_gamma", "estimator": "plain", "n": 4096},
    "exponent of the variance in T at gamma = 1, sampled as is: {}": {
        "quantity": "exponent",
        "estimator": "plain",
        "gamma": 1.0,
    },
    "with a value baseline: {}": {"quantity": "exponent", "estimator": "value", "gamma": 1.0},
}

GAMMAS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 1.0)
NAMES = (
    "plain",
    "position_value",
    "value",
    "rb_immediate",
    "rb_future",
    "rb_all",
    "rb_all_value",
)
BATCHES = tuple(4**i for i in range(10))
COUNT = {"smoke": 2_000, "quick": 20_000, "paper": 100_000}
KEYS = ["estimator", "horizon", "gamma", "n"]

Row = dict[str, Any]


def _settings(
    preset: str, draws: int, shape: tuple[int, int], horizons: tuple[int, ...]
) -> list[dict[str, Any]]:
    sizes = {"states": shape[0], "actions": shape[1], "horizons": list(horizons)}
    options = {"distance": 1.0, "heterogeneity": 0.5, "mixing": 0.1, "samples": COUNT[preset]}
    return [{**sizes, **options, "seed": seed} for seed in range(draws)]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings("smoke", 3, (3, 2), (2, 4, 8)),
    "quick": _settings("quick", 20, (8, 4), (4, 8, 16, 32, 64, 128)),
    "paper": _settings("paper", 50, (16, 8), (4, 8, 16, 32, 64, 128, 256, 512)),
}


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Compute exact moments of one random world and pair, by horizon, estimator and discount.

    Rows contain ||E g - grad J||^2, trCov and ||grad J||^2 of one trajectory, and the two
    worst-case bounds of the plain estimator. The shortest horizon of at least 16 also has Monte
    Carlo columns.

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        One row per horizon, estimator and discount.
    """
    s, a, horizons = setting["states"], setting["actions"], setting["horizons"]
    longest = random_chain(s, a, max(horizons), generator, setting["mixing"])
    student, teacher = random_pair(
        longest, generator, setting["distance"], setting["heterogeneity"]
    )
    checked = min((t for t in horizons if t >= 16), default=max(horizons))
    rows: list[Row] = []
    for horizon in horizons:
        mdp = replace(longest, horizon=horizon)
        truth = moments.expected_gradient(mdp, student, teacher, 1.0)
        labels = {
            "seed": setting["seed"],
            "horizon": horizon,
            "gradient2": float(truth.square().sum()),
            "kl_per_token": float(moments.sequence_kl(mdp, student, teacher).total) / horizon,
        }
        sampled_columns = (
            _sampled(mdp, student, teacher, setting["samples"], generator)
            if horizon == checked
            else {}
        )
        means, variances = moments.moments(mdp, student, teacher, NAMES, GAMMAS)
        for name, mean, variance in zip(NAMES, means, variances, strict=True):
            bias2 = (mean - truth).square().sum((-1, -2))
            for i, gamma in enumerate(GAMMAS):
                row = {**labels, "estimator": name, "gamma": gamma}
                row |= {"bias2": float(bias2[i]), "variance": float(variance[i])}
                if name == "plain":
                    tight, published = bounds(mdp, student, teacher, gamma)
                    row |= {"bound_tight": tight, "bound_quartic": published}
                    row |= sampled_columns.get(gamma, {})
                rows.append(row)
    return rows


def _sampled(
    mdp: TabularMDP,
    student: torch.Tensor,
    teacher: torch.Tensor,
    count: int,
    generator: torch.Generator,
) -> dict[float, Row]:
    family = {str(g): factory.make_objective("sampled_token", gamma=g) for g in GAMMAS}
    estimate = monte_carlo(mdp, student, teacher, family, count, generator)
    return {
        gamma: {
            "sampled_variance": float(estimate.variance[i]),
            "sampled_variance_se": float(estimate.variance_se[i]),
            "samples": count,
        }
        for i, gamma in enumerate(GAMMAS)
    }


# --- summary ------------------------------------------------------------------------------------


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds as a long table (quantity, estimator, horizon, gamma, n).

    Medians over worlds: `variance` and both bounds in nats^2; `bias2` and `mse` relative to ||grad
    J||^2 of the same world; `best_gamma`, the MSE-optimal discount at the longest horizon;
    `overtaking_batch`, the crossover batch size from which gamma = 1 errs less than gamma = 0.
    Means over worlds: `exponent`, the slope of log variance on log T between the two longest
    horizons; `sampled_z`, the (exact - sampled) variance in standard errors. Intervals are 95 %
    percentile bootstraps over worlds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    parts = [
        interval(rows.dropna(subset=[name]).assign(n=1), name, KEYS)
        for name in ("variance", "bound_quartic", "bound_tight")
    ]
    relative = rows.copy()
    relative[["bias2", "variance"]] = rows[["bias2", "variance"]].div(rows["gradient2"], axis=0)
    longest = relative[relative["horizon"] == relative["horizon"].max()]
    parts.append(interval(relative.assign(n=1), "bias2", KEYS))
    by_batch = pd.concat([relative.assign(n=n) for n in BATCHES], ignore_index=True)
    by_batch["mse"] = mse(by_batch["bias2"], by_batch["variance"], by_batch["n"])
    at_longest = by_batch[by_batch["horizon"] == by_batch["horizon"].max()]
    parts.append(interval(at_longest, "mse", KEYS))
    best = at_longest.loc[at_longest.groupby(["seed", "estimator", "n"])["mse"].idxmin()]
    best = best.assign(best_gamma=best["gamma"], gamma=np.nan)
    parts.append(interval(best, "best_gamma", KEYS))
    parts.append(interval(_crossovers(longest), "overtaking_batch", KEYS))
    parts.append(interval(_exponents(rows), "exponent", KEYS, np.mean))
    sampled = rows.dropna(subset=["sampled_variance"])
    error = sampled["variance"] - sampled["sampled_variance"]
    sampled = sampled.assign(n=1, sampled_z=error / sampled["sampled_variance_se"])
    parts.append(interval(sampled, "sampled_z", KEYS, np.mean))
    return pd.concat(parts, ignore_index=True)


def _crossovers(rows: pd.DataFrame) -> pd.DataFrame:
    wide = rows.pivot(
        index=["seed", "estimator", "horizon"], columns="gamma", values=["bias2", "variance"]
    )
    parts = wide["bias2"][0.0], wide["variance"][0.0], wide["variance"][1.0]
    return wide.index.to_frame(index=False).assign(overtaking_batch=crossover_batch_size(*parts))


def _exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """Return slopes between the two longest horizons; exact variances need no fit."""
    exponents = slopes(rows, "variance", "horizon", ["seed", "estimator", "gamma"])
    last = exponents[exponents["horizon"] == exponents["horizon"].max()]
    return last.rename(columns={"slope": "exponent"})
