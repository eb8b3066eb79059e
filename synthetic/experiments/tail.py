"""How soon a top-K loss that collapses is seen to: by the teacher's mass outside the support."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opd.objectives import factory
from synthetic.analysis.summary import interval
from synthetic.sampling.free_logits import expected_gradients

CLAIM = (
    "Whether un-normalised top-K collapses within a run depends on the teacher's mass outside the "
    "support. From a student that equals its teacher, descent reaches the same fixed point, "
    "p(S) = q(S)/e, whatever that mass is, but the time to get half-way grows nearly as its "
    "inverse: a support that leaves out a thousandth looks stable for hundreds of times as long as "
    "one that leaves out a third. Renormalised forms, a tail bucket and a sampled tail do not move."
)
FORMS = (
    "teacher_topk_unnormalised",
    "student_topk_unnormalised",
    "teacher_topk_published_tail",
    "teacher_topk",
    "teacher_topk_stopped",
    "teacher_topk_bucket",
    "teacher_topk_sampled_tail",
)
K, ACTIONS, RATE = 4, 32, 2.0
KEYS = ["objective", "tail", "iteration"]
HEADLINES: dict[str, dict[str, Any]] = {
    "iterations to half of the collapse, 0.3 outside the support: {}": {
        "quantity": "half_time",
        "objective": "teacher_topk_unnormalised",
        "tail": 0.3,
    },
    "the same, 0.03 outside: {}": {
        "quantity": "half_time",
        "objective": "teacher_topk_unnormalised",
        "tail": 0.03,
    },
    "exponent of that time in the mass outside, between 0.1 and 0.03: {}": {
        "quantity": "exponent",
        "objective": "teacher_topk_unnormalised",
        "tail": 0.03,
    },
    "renormalised, 0.3 outside: largest change of p(S): {}": {
        "quantity": "largest_change",
        "objective": "teacher_topk",
        "tail": 0.3,
    },
}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": [
        {"objective": x, "tails": (0.3, 0.1, 0.03), "prefixes": 3, "iterations": 120} for x in FORMS
    ],
    "quick": [
        {"objective": x, "tails": (0.3, 0.1, 0.03, 0.01), "prefixes": 16, "iterations": 600}
        for x in FORMS
    ],
    "paper": [
        {
            "objective": x,
            "tails": (0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
            "prefixes": 24,
            "iterations": 6000,
        }
        for x in FORMS
    ],
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Descend from the teacher itself, at many prefixes with each tail at once.

    A loss whose gradient is zero at the teacher stays there: it is not iterated. A prefix is a
    repetition, its index the seed; its teacher is the same for every tail but for the split of mass
    between the K most probable tokens and the rest.

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        One row per tail, recorded iteration and prefix.
    """
    tails, prefixes = setting["tails"], setting["prefixes"]
    noise = torch.randn(prefixes, ACTIONS, generator=generator, dtype=torch.float64)
    teacher = torch.cat([teacher_logits(noise, tail) for tail in tails])
    objective = factory.make_objective(setting["objective"], allow_collapse=True)
    ids = teacher.topk(K, -1).indices
    target = teacher.softmax(-1).gather(-1, ids).sum(-1)
    student, half_time = teacher.clone(), torch.full((len(teacher),), math.nan).double()
    recorded = recorded_iterations(setting["iterations"])
    moves, masses = True, {}
    for iteration in range(setting["iterations"] + 1):
        mass = student.softmax(-1).gather(-1, ids).sum(-1)
        if iteration in recorded:
            masses[iteration] = mass
        half_way = mass <= target * (1 + 1 / math.e) / 2
        half_time = torch.where(half_time.isnan() & half_way, float(iteration), half_time)
        if moves:
            gradient = expected_gradients(student, teacher, objective, K)
            moves = bool(gradient.abs().max() > 1e-14)
            student = student - RATE * gradient
    change = torch.stack([(x - target).abs() for x in masses.values()]).amax(0)
    rows: list[Row] = []
    for i, tail in enumerate(tails):
        for prefix in range(prefixes):
            j = i * prefixes + prefix
            labels = {"objective": setting["objective"], "tail": tail, "seed": prefix}
            last = {"half_time": float(half_time[j]), "largest_change": float(change[j])}
            rows += [
                labels | last | {"iteration": iteration, "mass_ratio": float(x[j] / target[j])}
                for iteration, x in masses.items()
            ]
    return rows


def teacher_logits(noise: Tensor, tail: float) -> Tensor:
    """Return (S, A) log-probabilities whose K largest leave out `tail`.

    Args:
        noise: (S, A) logits.
        tail: Mass outside the K most probable tokens.

    Returns:
        The same relative probabilities inside and outside the K largest of `noise`.
    """
    ids = noise.topk(K, -1).indices
    inside = torch.zeros_like(noise, dtype=torch.bool).scatter(-1, ids, True)
    head = noise.masked_fill(~inside, -math.inf).log_softmax(-1) + math.log1p(-tail)
    rest = noise.masked_fill(inside, -math.inf).log_softmax(-1) + math.log(tail)
    return torch.where(inside, head, rest)


def recorded_iterations(iterations: int) -> set[int]:
    """Return 0 and the iterations that are recorded, evenly on a logarithmic scale."""
    return {0, *(round(iterations ** (i / 40)) for i in range(41))}


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over prefixes.

    Mean of p(S)/q(S) by iteration; median iterations to half of the collapse, where every prefix
    got there; its exponent in the tail between neighbouring tails; largest change of p(S).

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    parts = [interval(rows, "mass_ratio", KEYS, np.mean)]
    last = rows[rows["iteration"] == rows["iteration"].max()].drop(columns="iteration")
    parts.append(interval(last, "largest_change", KEYS, np.max))
    arrived = last.groupby(["objective", "tail"])["half_time"].transform(lambda x: x.notna().all())
    collapsed = last[arrived]
    parts.append(interval(collapsed, "half_time", KEYS, np.median))
    steeper = collapsed.sort_values("tail", ascending=False)
    by_prefix = steeper.groupby(["objective", "seed"])
    exponents = steeper.assign(
        exponent=by_prefix["half_time"].transform(lambda x: np.log(x).diff())
        / by_prefix["tail"].transform(lambda x: np.log(x).diff())
    ).dropna(subset=["exponent"])
    parts.append(interval(exponents, "exponent", KEYS, np.median))
    return pd.concat(parts, ignore_index=True)
