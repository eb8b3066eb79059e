"""Training free logits on a top-K support: the student's probability mass on the support."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch

from opd.objectives import factory
from synthetic.analysis.summary import interval
from synthetic.sampling.free_logits import expected_gradients

CLAIM = (
    "Un-normalised top-K converges to p(S) = q(S)/e, even from a student that equals its teacher: "
    "the missing tail and the gradient of p(S) push mass out of the teacher's own support. "
    "Renormalised top-K does not control p(S); a stop-gradient head, a tail bucket and a sampled "
    "tail converge to the teacher."
)
FORMS = ("", "_unnormalised", "_stopped", "_bucket", "_sampled_tail", "_published_tail")
NAMES = (*(f"teacher_topk{form}" for form in FORMS), "full_reverse_kl")
KEYS = ["objective", "start", "k", "iteration"]
HEADLINES: dict[str, dict[str, Any]] = {
    "un-normalised, K = 4, from the teacher itself: final p(S) / (q(S)/e) is {}": {
        "quantity": "mass_over_fixed_point",
        "objective": "teacher_topk_unnormalised",
        "start": "teacher",
        "k": 4,
    },
    "un-normalised, K = 4, from a distant start: {}": {
        "quantity": "mass_over_fixed_point",
        "objective": "teacher_topk_unnormalised",
        "start": "afar",
        "k": 4,
    },
    "renormalised, K = 4, from a distant start: final p(S) / q(S) is {}": {
        "quantity": "mass_over_teacher",
        "objective": "teacher_topk",
        "start": "afar",
        "k": 4,
    },
    "the same for the sampled tail, from a distant start: {}": {
        "quantity": "mass_over_teacher",
        "objective": "teacher_topk_sampled_tail",
        "start": "afar",
        "k": 4,
    },
    "full reverse KL left by the published tail, K = 4, from the teacher itself: {} nats": {
        "quantity": "final_kl",
        "objective": "teacher_topk_published_tail",
        "start": "teacher",
        "k": 4,
    },
}


def _settings(ks: tuple[int, ...], prefixes: int, iterations: int) -> list[dict[str, Any]]:
    sizes = {"prefixes": prefixes, "actions": 32, "iterations": iterations, "rate": 2.0}
    return [{**sizes, "start": start, "k": k} for start in ("teacher", "afar") for k in ks]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings((4,), 6, 20),
    "quick": _settings((4, 16), 48, 1000),
    "paper": _settings((1, 4, 16), 100, 3000),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Run gradient descent on the expected loss of many prefixes, each with free logits of its own.

    The expectation over the sampled token is a sum over all of them: prefixes are states, and every
    token of every state is one response of length 1. A prefix is a repetition, its index the seed.

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        One row per objective, recorded iteration and prefix.
    """
    s, a = setting["prefixes"], setting["actions"]
    teacher = 2 * torch.randn(s, a, generator=generator, dtype=torch.float64)
    offset = 2 * torch.randn(s, a, generator=generator, dtype=torch.float64)
    start = teacher if setting["start"] == "teacher" else teacher + offset
    recorded_iterations = sorted(
        {0, *(round(setting["iterations"] ** (i / 24)) for i in range(25))}
    )
    rows: list[Row] = []
    labels = {key: setting[key] for key in ("start", "k")}
    for name in NAMES:
        objective = factory.make_objective(name, allow_collapse=True)
        student = start.clone()
        for iteration in range(setting["iterations"] + 1):
            if iteration in recorded_iterations:
                row_labels = {**labels, "objective": name, "iteration": iteration}
                rows += [
                    row_labels | numbers
                    for numbers in support_metrics(student, teacher, setting["k"])
                ]
            gradient = expected_gradients(student, teacher, objective, setting["k"])
            student = student - setting["rate"] * gradient
    return rows


def support_metrics(student: torch.Tensor, teacher: torch.Tensor, k: int) -> list[Row]:
    """Return, per prefix, p(S), its ratios to q(S)/e and q(S), full reverse KL and entropy."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    ids = teacher.topk(k, -1).indices
    student_mass, teacher_mass = p.gather(-1, ids).sum(-1), q.gather(-1, ids).sum(-1)
    columns = {
        "seed": torch.arange(len(p)),
        "mass": student_mass,
        "mass_over_fixed_point": student_mass * math.e / teacher_mass,
        "mass_over_teacher": student_mass / teacher_mass,
        "kl": (p * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1),
        "entropy": -(p * student.log_softmax(-1)).sum(-1),
    }
    values = zip(*(x.tolist() for x in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over prefixes as means, by objective, start, k and iteration.

    `mass`, `kl` and `entropy` at every recorded iteration; at the last one, without it as a key,
    `mass_over_fixed_point`, `mass_over_teacher` and `final_kl`. Intervals resample prefixes.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    parts = [interval(rows, name, KEYS, np.mean) for name in ("mass", "kl", "entropy")]
    last = rows[rows["iteration"] == rows["iteration"].max()].drop(columns="iteration")
    last = last.assign(final_kl=last["kl"])
    names = ("mass_over_fixed_point", "mass_over_teacher", "final_kl")
    parts += [interval(last, name, KEYS, np.mean) for name in names]
    return pd.concat(parts, ignore_index=True)
