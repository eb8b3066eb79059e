"""Replication of the published toy problem, with its variance metric and one at equal policies."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from synthetic.analysis.summary import interval
from synthetic.toy import control, distillation
from synthetic.toy.control import BATCH, GAMMAS, TARGETS, DistillationConfig

CLAIM = (
    "The published metric confounds the estimator's variance with its training path. At equal "
    "policies the variance still rises with gamma. Whether gamma = 1 fails to reach the targets "
    "depends on choices that the paper leaves open: with Adam it reaches them, with plain "
    "gradient descent every gamma diverges."
)
PUBLISHED_SEEDS = (42, 43, 2026)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "clipped": {"clip": 1.0},
    "fast": {"rate": 1e-2},
    "descent": {"optimizer": "sgd"},
}
"""Values of `DistillationConfig` that differ from its defaults."""
KEYS = ["variant", "gamma", "task", "iteration", "path"]
TASKS = ("left", "right")
INFINITE = 1e30
"""Replaces the metric of a diverged run, so that medians include it."""
_END = {"variant": "default", "task": "left"}
HEADLINES: dict[str, dict[str, Any]] = {
    "published metric of gamma = 1 over gamma = 0, second half of training, own paths: {}": {
        **_END,
        "quantity": "published_ratio",
        "gamma": 1.0,
    },
    "unbiased variance of gamma = 1 over gamma = 0 at the same policies: {}": {
        **_END,
        "quantity": "equal_ratio",
        "gamma": 1.0,
    },
    "squared relative bias of gamma = 0 at the same policies: {}": {
        **_END,
        "quantity": "equal_bias2",
        "gamma": 0.0,
    },
    "final distance to the target, gamma = 0: {}": {**_END, "quantity": "distance", "gamma": 0.0},
    "gamma = 1: {}": {**_END, "quantity": "distance", "gamma": 1.0},
    "final KL a step from the teacher, gamma = 0: {} nats": {
        **_END,
        "quantity": "local_kl",
        "gamma": 0.0,
    },
    "gamma = 1: {} nats": {**_END, "quantity": "local_kl", "gamma": 1.0},
    "share of diverged runs at gamma = 1, Adam: {}": {
        "quantity": "diverged",
        "variant": "default",
        "gamma": 1.0,
    },
    "share of diverged runs at gamma = 0, plain gradient descent: {}": {
        "quantity": "diverged",
        "variant": "descent",
        "gamma": 0.0,
    },
}


def _settings(
    seeds: tuple[int, ...], variants: tuple[str, ...], num_other_seeds: int, **sizes: int
) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "variant": variant, **sizes}
        for variant in variants
        for seed in (seeds if variant == "default" else seeds[:num_other_seeds])
    ]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(
        (42, 43), ("default", "descent"), 2, iterations=6, count=16, teacher_iterations=3
    ),
    "quick": _settings(
        (42, 43), ("default", "descent"), 2, iterations=100, count=256, teacher_iterations=200
    ),
    "short": _settings(
        (*PUBLISHED_SEEDS, *range(10)),
        tuple(VARIANTS),
        3,
        iterations=500,
        count=1024,
        teacher_iterations=200,
    ),
    "paper": _settings(
        (*PUBLISHED_SEEDS, *range(10)),
        tuple(VARIANTS),
        3,
        iterations=2000,
        count=2048,
        teacher_iterations=300,
    ),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Measure one seed and variant; rows are distinguished by `kind`.

    metric: the published one along each discount's own path; equal: at the policies of fixed
    iterations of the paths of gamma = 0 and gamma = 1, every discount's unbiased variance per
    trajectory on common rollouts, and the debiased squared bias against gamma = 1; final: distance
    to the target, local KL, J and divergence; visits: counts by time and position.

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        Rows of all kinds.
    """
    options = {"teacher_iterations": setting["teacher_iterations"], **VARIANTS[setting["variant"]]}
    config, last = DistillationConfig(**options), setting["iterations"]
    teachers = control.train_teachers(config, generator)
    students = control.init_networks(len(GAMMAS), 3, config.hidden, config.sigma_floor, generator)
    snapshot_iterations = sorted({0, last, *(i for i in (30, 100, 300, 1000) if i < last)})
    run = distillation.distill(
        students, teachers, GAMMAS, last, snapshot_iterations, BATCH, config, generator
    )
    labels = {"seed": setting["seed"], "variant": setting["variant"]}
    rows: list[Row] = []
    for iteration in range(0, last, 10 if last > 100 else 2):
        for task in (0, 1):  # consecutive iterations alternate between the tasks
            if iteration + task >= last:
                continue
            values = run.metric[iteration + task].nan_to_num(INFINITE, INFINITE).tolist()
            row_labels = {"kind": "metric", "task": TASKS[task], "iteration": iteration}
            rows += [{**labels, **row_labels, "gamma": g, "metric": v} for g, v in _pairs(values)]
    for path in (0.0, 1.0):
        for iteration, networks in run.snapshots.items():
            rows += [
                {**labels, "kind": "equal", "path": path, "iteration": iteration, **row}
                for row in _equal(networks, path, teachers, setting["count"], config, generator)
            ]
    rows += [
        {**labels, **row} for row in _final(run, teachers, setting["count"], config, generator)
    ]
    return rows


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return [(g, min(v, INFINITE)) for g, v in zip(GAMMAS, values, strict=True)]


def _equal(
    networks: control.Networks,
    path: float,
    teachers: tuple[control.Networks, control.Networks],
    count: int,
    config: DistillationConfig,
    generator: torch.Generator,
) -> list[Row]:
    """Return unbiased variances of all discounts at one policy, of all layers and the last."""
    student, rows = networks.repeat(GAMMAS.index(path), 1), []
    for task, teacher in enumerate(teachers):
        noise = torch.randn(count, control.HORIZON, generator=generator, dtype=torch.float64)
        gradients = distillation.trajectory_gradients(student, teacher, task, GAMMAS, noise, config)
        flat = [torch.cat([x.flatten(1) for x in layers], 1) for layers in gradients]
        norm2 = float(distillation.squared_mean(flat[-1]))
        for gamma, layers, flat_gradient in zip(GAMMAS, gradients, flat, strict=True):
            numbers = {
                "variance": float(distillation.total_variance(flat_gradient)),
                "output_variance": float(distillation.total_variance(layers[-1])),
                "bias2": float(distillation.squared_mean(flat_gradient - flat[-1])),
                "norm2": norm2,
            }
            rows.append({"gamma": gamma, "task": TASKS[task], **numbers})
    return rows


def _final(
    run: distillation.DistillationRun,
    teachers: tuple[control.Networks, control.Networks],
    count: int,
    config: DistillationConfig,
    generator: torch.Generator,
) -> list[Row]:
    rows: list[Row] = []
    edges = np.arange(-8.0, 8.01, 0.25)
    for task, teacher in enumerate(teachers):
        noise = torch.randn(count, control.HORIZON, generator=generator, dtype=torch.float64)
        outcome = distillation.evaluate_students(run.students, teacher, task, noise, config)
        distances = (outcome[0][..., -1] - TARGETS[task]).abs().mean(1)
        columns = [x.nan_to_num(INFINITE, INFINITE).tolist() for x in (distances, *outcome[1:])]
        for i, gamma in enumerate(GAMMAS):
            row_labels = {"gamma": gamma, "task": TASKS[task]}
            distance, local_kl, total = (min(c[i], INFINITE) for c in columns)
            numbers = {"distance": distance, "local_kl": local_kl, "sequence_kl": total}
            rows.append(
                {"kind": "final", **row_labels, **numbers, "iteration": int(run.diverged[i])}
                | {"diverged": float(run.diverged[i] >= 0)}
            )
            if gamma not in (0.0, 0.5, 1.0):
                continue
            for step in range(control.HORIZON + 1):
                counts, _ = np.histogram(outcome[0][i, :, step].numpy(), edges)
                rows += [
                    {"kind": "visits", **row_labels, "step": step}
                    | {"position": float(edges[j] + 0.125), "visits": int(counts[j])}
                    for j in np.flatnonzero(counts)
                ]
    return rows


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over seeds as medians, with the published seeds' own curves.

    `metric` by variant, gamma, task and iteration; `seed_metric` for each published seed, with the
    seed as `worlds`; `equal_variance`, `equal_output_variance` and `equal_bias2_by_path` (relative
    to |E g_1|^2) by path and iteration; their ratios to gamma = 0, both of the output layer:
    `published_ratio` over the second half of training and `equal_ratio` at the last policy of gamma
    = 0's path; `distance`, `local_kl`; `diverged`, a fraction with its Clopper-Pearson interval;
    `visits` of the first published seed, with step and position. Intervals resample seeds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    metric = rows[(rows["kind"] == "metric")]
    last = int(metric["iteration"].max())
    # at most fifty points per curve
    metric = metric[metric["iteration"] % (10 * math.ceil(last / 500) if last > 100 else 1) == 0]
    parts = [*_by_variant(metric, "metric")]
    published = metric[metric["seed"].isin(PUBLISHED_SEEDS) & (metric["variant"] == "default")]
    parts.append(
        published[["variant", "gamma", "task", "iteration"]].assign(
            quantity="seed_metric",
            value=published["metric"],
            low=published["metric"],
            high=published["metric"],
            worlds=published["seed"],
        )
    )
    equal = rows[rows["kind"] == "equal"].copy()
    equal["equal_variance"] = equal["variance"]
    equal["equal_output_variance"] = equal["output_variance"]
    equal["equal_bias2_by_path"] = equal["bias2"] / equal["norm2"]
    equal = equal[equal["variant"] == "default"]
    names = ("equal_variance", "equal_output_variance", "equal_bias2_by_path")
    parts += [interval(equal, name, KEYS) for name in names]
    parts += _ratios(metric, equal)
    final = rows[rows["kind"] == "final"].drop(columns="iteration")
    for name in ("distance", "local_kl", "sequence_kl"):
        parts += _by_variant(final, name)
    parts.append(_diverged(final[final["task"] == "left"]))
    visits = rows[
        (rows["kind"] == "visits")
        & (rows["seed"] == PUBLISHED_SEEDS[0])
        & (rows["variant"] == "default")
    ]
    parts.append(
        visits[["variant", "gamma", "task", "step", "position"]].assign(
            quantity="visits", value=visits["visits"], low=np.nan, high=np.nan, worlds=1
        )
    )
    return pd.concat(parts, ignore_index=True)


def _by_variant(rows: pd.DataFrame, name: str) -> list[pd.DataFrame]:
    """Summarise each variant separately, since variants have different numbers of seeds."""
    return [
        interval(variant_rows, name, KEYS)
        for _, variant_rows in rows.groupby("variant", sort=False)
    ]


def _ratios(metric: pd.DataFrame, equal: pd.DataFrame) -> list[pd.DataFrame]:
    late = metric[metric["iteration"] >= metric["iteration"].max() / 2]
    medians = late.groupby(["seed", "variant", "gamma", "task"])["metric"].median().reset_index()
    index_columns = ["seed", "variant", "task"]
    base = medians[medians["gamma"] == 0].set_index(index_columns)["metric"]
    medians["published_ratio"] = (
        medians["metric"]
        / base.reindex(pd.MultiIndex.from_frame(medians[index_columns])).to_numpy()
    )
    end = equal[(equal["path"] == 0) & (equal["iteration"] == equal["iteration"].max())]
    end = end.drop(columns=["path", "iteration"])
    # the published metric is of the output layer too
    base = end[end["gamma"] == 0].set_index(index_columns)["output_variance"]
    reference = base.reindex(pd.MultiIndex.from_frame(end[index_columns])).to_numpy()
    end = end.assign(
        equal_ratio=end["output_variance"] / reference, equal_bias2=end["equal_bias2_by_path"]
    )
    return [
        *_by_variant(medians, "published_ratio"),
        interval(end, "equal_ratio", KEYS),
        interval(end, "equal_bias2", KEYS),
    ]


def _diverged(final: pd.DataFrame) -> pd.DataFrame:
    records = []
    for (variant, gamma), group_rows in final.groupby(["variant", "gamma"], sort=False):
        test = stats.binomtest(int(group_rows["diverged"].sum()), len(group_rows))
        low, high = test.proportion_ci(0.95)
        labels = {"variant": variant, "gamma": gamma, "quantity": "diverged"}
        share = group_rows["diverged"].mean()
        records.append(
            labels | {"value": share, "low": low, "high": high, "worlds": len(group_rows)}
        )
    return pd.DataFrame(records)
