"""The published toy replicated, and its variance metric beside one at equal policies."""

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
    "The published metric mixes the estimator's variance with where its own training path went. At "
    "equal policies the variance still rises with gamma. Whether gamma = 1 fails to reach the "
    "targets hinges on choices that the paper leaves open: with Adam it reaches them, with plain "
    "gradient descent every gamma diverges."
)
PUBLISHED_SEEDS = (42, 43, 2026)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "clipped": {"clip": 1.0},
    "fast": {"rate": 1e-2},
    "descent": {"optimizer": "sgd"},
}
"""What of `DistillationConfig` differs from its defaults."""
KEYS = ["variant", "gamma", "task", "iteration", "path"]
TASKS = ("left", "right")
INFINITE = 1e30
"""Stands for the metric of a diverged run, so that medians keep it."""
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
    seeds: tuple[int, ...], variants: tuple[str, ...], few: int, **sizes: int
) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "variant": variant, **sizes}
        for variant in variants
        for seed in (seeds if variant == "default" else seeds[:few])
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
    """Rows of one seed and variant, told apart by `kind`.

    metric: the published one along each discount's own path; equal: at the policies of fixed
    iterations of the paths of gamma = 0 and gamma = 1, every discount's unbiased variance a
    trajectory on common rollouts, and the debiased squared bias against gamma = 1; final: distance
    to the target, local KL, J and divergence; visits: counts by time and position.
    """
    how = {"teacher_iterations": setting["teacher_iterations"], **VARIANTS[setting["variant"]]}
    choices, last = DistillationConfig(**how), setting["iterations"]
    teachers = control.train_teachers(choices, generator)
    students = control.fresh(len(GAMMAS), 3, choices.hidden, choices.sigma_floor, generator)
    kept = sorted({0, last, *(i for i in (30, 100, 300, 1000) if i < last)})
    done = distillation.distil(students, teachers, GAMMAS, last, kept, BATCH, choices, generator)
    about = {"seed": setting["seed"], "variant": setting["variant"]}
    rows: list[Row] = []
    for iteration in range(0, last, 10 if last > 100 else 2):
        for task in (0, 1):  # the next iteration is of the other task
            if iteration + task >= last:
                continue
            values = done.metric[iteration + task].nan_to_num(INFINITE, INFINITE).tolist()
            at = {"kind": "metric", "task": TASKS[task], "iteration": iteration}
            rows += [{**about, **at, "gamma": g, "metric": v} for g, v in _pairs(values)]
    for path in (0.0, 1.0):
        for iteration, networks in done.path.items():
            rows += [
                {**about, "kind": "equal", "path": path, "iteration": iteration, **row}
                for row in _equal(networks, path, teachers, setting["count"], choices, generator)
            ]
    rows += [
        {**about, **row} for row in _final(done, teachers, setting["count"], choices, generator)
    ]
    return rows


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return [(g, min(v, INFINITE)) for g, v in zip(GAMMAS, values, strict=True)]


def _equal(
    networks: control.Networks,
    path: float,
    teachers: tuple[control.Networks, control.Networks],
    count: int,
    choices: DistillationConfig,
    generator: torch.Generator,
) -> list[Row]:
    """Unbiased variances of all discounts at one policy, of all layers and of the last."""
    student, rows = networks.of(GAMMAS.index(path), 1), []
    for task, teacher in enumerate(teachers):
        noise = torch.randn(count, control.HORIZON, generator=generator, dtype=torch.float64)
        each = distillation.trajectory_gradients(student, teacher, task, GAMMAS, noise, choices)
        flat = [torch.cat([x.flatten(1) for x in layers], 1) for layers in each]
        norm2 = float(distillation.squared_mean(flat[-1]))
        for gamma, layers, whole in zip(GAMMAS, each, flat, strict=True):
            numbers = {
                "variance": float(distillation.total_variance(whole)),
                "output_variance": float(distillation.total_variance(layers[-1])),
                "bias2": float(distillation.squared_mean(whole - flat[-1])),
                "norm2": norm2,
            }
            rows.append({"gamma": gamma, "task": TASKS[task], **numbers})
    return rows


def _final(
    done: distillation.Distilled,
    teachers: tuple[control.Networks, control.Networks],
    count: int,
    choices: DistillationConfig,
    generator: torch.Generator,
) -> list[Row]:
    rows: list[Row] = []
    edges = np.arange(-8.0, 8.01, 0.25)
    for task, teacher in enumerate(teachers):
        noise = torch.randn(count, control.HORIZON, generator=generator, dtype=torch.float64)
        found = distillation.outcome(done.students, teacher, task, noise, choices)
        away = (found[0][..., -1] - TARGETS[task]).abs().mean(1)
        columns = [x.nan_to_num(INFINITE, INFINITE).tolist() for x in (away, *found[1:])]
        for i, gamma in enumerate(GAMMAS):
            at = {"gamma": gamma, "task": TASKS[task]}
            distance, local, total = (min(c[i], INFINITE) for c in columns)
            numbers = {"distance": distance, "local_kl": local, "sequence_kl": total}
            rows.append(
                {"kind": "final", **at, **numbers, "iteration": int(done.diverged[i])}
                | {"diverged": float(done.diverged[i] >= 0)}
            )
            if gamma not in (0.0, 0.5, 1.0):
                continue
            for step in range(control.HORIZON + 1):
                counts, _ = np.histogram(found[0][i, :, step].numpy(), edges)
                rows += [
                    {"kind": "visits", **at, "step": step}
                    | {"position": float(edges[j] + 0.125), "visits": int(counts[j])}
                    for j in np.flatnonzero(counts)
                ]
    return rows


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over seeds, with the published seeds' curves beside them.

    `metric` by variant, gamma, task and iteration, and for each published seed alone `seed_metric`
    with the seed as `worlds`; `equal_variance`, `equal_output_variance` and `equal_bias2_by_path`
    (relative to |E g_1|^2) by path and iteration; their ratios to gamma = 0, `published_ratio` over
    the second half of training and `equal_ratio` at the last policy of gamma = 0's path, both of
    the output layer;
    `distance`, `local_kl`; `diverged`, a share with its Clopper-Pearson interval; `visits` of the
    first published seed, with step and position. Intervals resample seeds.
    """
    metric = rows[(rows["kind"] == "metric")]
    last = int(metric["iteration"].max())
    # at most fifty points a curve
    metric = metric[metric["iteration"] % (10 * math.ceil(last / 500) if last > 100 else 1) == 0]
    parts = [*_by_variant(metric, "metric")]
    alone = metric[metric["seed"].isin(PUBLISHED_SEEDS) & (metric["variant"] == "default")]
    parts.append(
        alone[["variant", "gamma", "task", "iteration"]].assign(
            quantity="seed_metric",
            value=alone["metric"],
            low=alone["metric"],
            high=alone["metric"],
            worlds=alone["seed"],
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
    """Variants have different numbers of seeds."""
    return [interval(mine, name, KEYS) for _, mine in rows.groupby("variant", sort=False)]


def _ratios(metric: pd.DataFrame, equal: pd.DataFrame) -> list[pd.DataFrame]:
    late = metric[metric["iteration"] >= metric["iteration"].max() / 2]
    own = late.groupby(["seed", "variant", "gamma", "task"])["metric"].median().reset_index()
    at = ["seed", "variant", "task"]
    base = own[own["gamma"] == 0].set_index(at)["metric"]
    own["published_ratio"] = (
        own["metric"] / base.reindex(pd.MultiIndex.from_frame(own[at])).to_numpy()
    )
    end = equal[(equal["path"] == 0) & (equal["iteration"] == equal["iteration"].max())]
    end = end.drop(columns=["path", "iteration"])
    # of the output layer, as the published metric is
    base = end[end["gamma"] == 0].set_index(at)["output_variance"]
    reference = base.reindex(pd.MultiIndex.from_frame(end[at])).to_numpy()
    end = end.assign(
        equal_ratio=end["output_variance"] / reference, equal_bias2=end["equal_bias2_by_path"]
    )
    return [
        *_by_variant(own, "published_ratio"),
        interval(end, "equal_ratio", KEYS),
        interval(end, "equal_bias2", KEYS),
    ]


def _diverged(final: pd.DataFrame) -> pd.DataFrame:
    records = []
    for (variant, gamma), mine in final.groupby(["variant", "gamma"], sort=False):
        test = stats.binomtest(int(mine["diverged"].sum()), len(mine))
        low, high = test.proportion_ci(0.95)
        about = {"variant": variant, "gamma": gamma, "quantity": "diverged"}
        share = mine["diverged"].mean()
        records.append(about | {"value": share, "low": low, "high": high, "worlds": len(mine)})
    return pd.DataFrame(records)
