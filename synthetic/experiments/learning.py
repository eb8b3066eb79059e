"""Learning curves of a student that cannot represent its teacher, with tuned step sizes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from opd.objectives import factory
from synthetic.analysis.summary import interval
from synthetic.learning import descent, students
from synthetic.seeds import derive

CLAIM = (
    "With a student that cannot represent its teacher, the token-level and sequence-level optima "
    "differ by a few per cent at most, and on a small budget noise decides: the sampled "
    "sequence-level objective ends several times farther from the optimum than the token-level "
    "one; with mean costs and a leave-one-out baseline it comes close to the local KL. A "
    "renormalised top 2 of 6 stays far from the optimum, an un-normalised one learns nothing at "
    "any learning rate, and a sampled tail corrects this."
)
K = 2
"""Size of the top-K support."""
OBJECTIVES: dict[str, tuple[str, float, str]] = {
    "token": ("sampled_token", 0.0, "none"),
    "gamma 0.9": ("sampled_token", 0.9, "none"),
    "sequence": ("sampled_token", 1.0, "none"),
    "sequence, leave one out": ("sampled_token", 1.0, "leave_one_out"),
    "local KL": ("full_reverse_kl", 0.0, "none"),
    "sequence, mean costs": ("full_reverse_kl", 1.0, "leave_one_out"),
    "top 2": ("teacher_topk", 0.0, "none"),
    "top 2, un-normalised": ("teacher_topk_unnormalised", 0.0, "none"),
    "top 2, sampled tail": ("teacher_topk_sampled_tail", 0.0, "none"),
}
"""Name in `opd.objectives.factory`, discount, baseline."""
RATES = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "adam": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)}
"""Learning rates tried, by optimizer."""
TUNING = 4
"""Number of seeds per learning rate."""
CLIP = 0.5
"""Largest gradient norm of the clipped runs."""
DIVERGED = 2.0
"""A run has diverged if its J is not finite or exceeds this multiple of its initial J."""
KEYS = ["objective", "optimizer", "clip", "iteration"]
METRICS = ("sequence_kl", "student_kl", "teacher_kl", "reward")
CURVES = (*METRICS, "excess", "teacher_excess", "reward_short")
LAST = ("final", "worst", "diverged", "rate", "at_edge")
OPTIMA = ("optimum_ratio", "optimum_kl_ratio", "basin_ratio")
_ADAM = {"optimizer": "adam", "clip": "none"}


def _final_keys(objective: str, **overrides: str) -> dict[str, Any]:
    return {"quantity": "final", "objective": objective, **_ADAM, **overrides}


HEADLINES: dict[str, dict[str, Any]] = {
    "J at the token-level optimum over J at the nearby sequence-level optimum: {}": {
        "quantity": "optimum_ratio"
    },
    "excess of J over the sequence-level optimum after training, relative, token level, Adam: {}": (
        _final_keys("token")
    ),
    "sequence level as sampled: {}": _final_keys("sequence"),
    "with a leave-one-out baseline: {}": _final_keys("sequence, leave one out"),
    "with mean costs as well: {}": _final_keys("sequence, mean costs"),
    "local KL: {}": _final_keys("local KL"),
    "top 2, renormalised: {}": _final_keys("top 2"),
    "top 2, un-normalised: {}": _final_keys("top 2, un-normalised"),
    "top 2 with a sampled tail: {}": _final_keys("top 2, sampled tail"),
    "sequence level as sampled, gradient descent: {}": _final_keys("sequence", optimizer="sgd"),
    "the same, clipped: {}": _final_keys("sequence", optimizer="sgd", clip="0.5"),
}


def _settings(
    worlds: int, seeds: int, iterations: int, shape: tuple[int, int, int]
) -> list[dict[str, Any]]:
    # linear student: J of a network has so many minima that the one reached dominates the result
    sizes = {"shape": list(shape), "features": 2, "hidden": 0, "batch": 16}
    sizes |= {"seeds": seeds, "iterations": iterations}
    cells = [
        {"objective": name, "optimizer": optimizer, "clip": clip}
        for name in OBJECTIVES
        for optimizer in RATES
        for clip in ("none", str(CLIP))
    ]
    return [{**cell, **sizes, "world": world} for cell in cells for world in range(worlds)]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, 2, 2, (6, 3, 4)),
    "quick": _settings(4, 10, 60, (8, 6, 24)),
    "paper": _settings(10, 20, 200, (8, 6, 24)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Tune the learning rate on a few seeds' final J, then train `seeds` new ones with the best.

    World and starting point depend only on the world's number and the sizes, so that all objectives
    use the same ones. Rows are means over seeds of exact metrics.

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        One row per recorded iteration, and for one objective a row of the optima.
    """
    sizes = {key: setting[key] for key in ("shape", "features", "hidden", "world")}
    world_generator = derive("learning world", sizes)
    shape = tuple(setting["shape"])
    problem = students.capacity_limited_problem(
        shape, setting["features"], setting["hidden"], 0.05, world_generator
    )
    start = problem.student.start(1, world_generator)
    rates, num_iterations = RATES[setting["optimizer"]], setting["iterations"]
    tried_rates = [rate for rate in rates for _ in range(TUNING)]
    end_metrics = students.evaluate_students(
        problem,
        _train_runs(problem, start, setting, tried_rates, [num_iterations], generator)[
            num_iterations
        ],
    )
    best = best_rate(rates, end_metrics.sequence_kl.view(len(rates), TUNING))
    recorded_iterations = sorted({round(num_iterations * i / 10) for i in range(11)})
    snapshots = _train_runs(
        problem, start, setting, [best] * setting["seeds"], recorded_iterations, generator
    )
    labels = {"seed": setting["world"]}
    labels |= {key: setting[key] for key in ("objective", "optimizer", "clip")}
    start_kl = students.evaluate_students(problem, start).sequence_kl
    rows: list[Row] = []
    for iteration, parameters in snapshots.items():
        metrics = students.evaluate_students(problem, parameters)
        row = {metric: float(getattr(metrics, metric).mean()) for metric in METRICS}
        row["worst_kl"] = float(metrics.sequence_kl.max())
        row["diverged"] = diverged_share(metrics.sequence_kl, start_kl)
        row |= {"rate": best, "at_edge": float(best in (rates[0], rates[-1]))}
        rows.append({**labels, "iteration": iteration, **row})
    described = (setting["objective"], setting["optimizer"], setting["clip"])
    if described == ("token", "sgd", "none"):  # of all cells of a world, one computes its optima
        rows.append({**labels, **_optima(problem, start, world_generator)})
    return rows


def _train_runs(
    problem: students.LearningProblem,
    start: torch.Tensor,
    setting: dict[str, Any],
    rates: list[float],
    recorded_iterations: list[int],
    generator: torch.Generator,
) -> dict[int, torch.Tensor]:
    """Train one run per rate, all from the same start (1, D).

    Args:
        problem: World, student and teacher.
        start: (1, D) initial parameters.
        setting: One of `SETTINGS`.
        rates: R learning rates.
        recorded_iterations: Iterations whose parameters are recorded.
        generator: Source of randomness.

    Returns:
        Parameters (R, D) by iteration.
    """
    name, gamma, baseline = OBJECTIVES[setting["objective"]]
    rate_tensor = torch.tensor(rates, dtype=torch.float64)
    optimizer = (
        descent.sgd(rate_tensor)
        if setting["optimizer"] == "sgd"
        else descent.adam(rate_tensor, start.shape[1])
    )
    return descent.train(
        problem,
        start.expand(len(rates), -1).clone(),
        factory.make_objective(name, gamma=gamma, baseline=baseline, allow_collapse=True),
        optimizer,
        setting["iterations"],
        setting["batch"],
        math.inf if setting["clip"] == "none" else float(setting["clip"]),
        recorded_iterations,
        generator,
        K if "topk" in name else None,
    )


def best_rate(rates: Sequence[float], final_kl: torch.Tensor) -> float:
    """Return the learning rate of least mean J over its seeds.

    Args:
        rates: Learning rates.
        final_kl: (rates, seeds) final J.

    Returns:
        A rate whose J is finite for all seeds, if there is one, else the first.
    """
    return rates[int(final_kl.mean(1).nan_to_num(math.inf).argmin())]


def diverged_share(sequence_kl: torch.Tensor, start_kl: torch.Tensor) -> float:
    """Return the fraction of runs whose J is not finite or above DIVERGED times the start's."""
    return float((~(sequence_kl <= DIVERGED * start_kl)).double().mean())


def _optima(
    problem: students.LearningProblem, start: torch.Tensor, generator: torch.Generator
) -> Row:
    """Return metrics of the token-level optimum, the nearby and the best sequence-level one."""
    token = students.token_optimum(problem, start[0])
    nearby_optimum = students.sequence_optimum(problem, token[None])
    starts = torch.cat(
        [start, nearby_optimum[None], *(problem.student.start(1, generator) for _ in range(3))]
    )
    candidates = torch.stack([token, nearby_optimum, students.sequence_optimum(problem, starts)])
    metrics = students.evaluate_students(problem, candidates)
    token_kl, nearby_kl, least_kl = metrics.sequence_kl.tolist()
    return {
        "least_kl": least_kl,
        "least_teacher_kl": float(metrics.teacher_kl[2]),
        "best_reward": float(metrics.reward[2]),
        "optimum_ratio": token_kl / nearby_kl,
        "optimum_kl_ratio": float(metrics.teacher_kl[0] / metrics.teacher_kl[1]),
        "basin_ratio": nearby_kl / least_kl,
    }


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds as medians by objective, optimizer, clip and iteration.

    J is `sequence_kl`; `student_kl` and `teacher_kl` are the KL per token on the student's and the
    teacher's visits, `reward` the task reward. Relative to the best sequence-level optimum found:
    `excess` of J and `teacher_excess` of the KL on the teacher's visits (ratio minus 1) and
    `reward_short` (difference). Without iteration: `final` is the last excess, `worst` that of the
    worst seed, `diverged` the fraction of seeds; `rate` is the tuned learning rate, `at_edge` the
    fraction of worlds where it is at the edge of the grid (means). `optimum_ratio` and
    `optimum_kl_ratio` are J and the KL on the teacher's visits at the token-level optimum over
    those at the nearby sequence-level optimum; `basin_ratio` is J there over the least found. Seeds
    are averaged within a world; intervals resample worlds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    optima = rows[rows["clip"] == "none"].dropna(subset=["least_kl"])
    world_optima = optima.set_index("seed")
    curves = rows.dropna(subset=["sequence_kl"])
    floor, world = curves["seed"].map(world_optima["least_kl"]), curves["seed"]
    curves = curves.assign(
        excess=curves["sequence_kl"] / floor - 1,
        worst=curves["worst_kl"] / floor - 1,
        teacher_excess=curves["teacher_kl"] / world.map(world_optima["least_teacher_kl"]) - 1,
        reward_short=world.map(world_optima["best_reward"]) - curves["reward"],
    )
    last = curves[curves["iteration"] == curves["iteration"].max()].drop(columns="iteration")
    last = last.assign(final=last["excess"])
    parts = [interval(curves, name, KEYS) for name in CURVES]
    for name in LAST:
        statistic = np.mean if name in ("diverged", "at_edge") else np.median
        parts.append(interval(last, name, KEYS, statistic))
    parts += [interval(optima[["seed", name]], name, KEYS) for name in OPTIMA]
    return pd.concat(parts, ignore_index=True)
