"""Training free logits on a top-K support: where the student's mass on the support goes."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch

from opd.objectives import factory
from synthetic.analysis.summary import interval
from synthetic.sampling.free_logits import expected

CLAIM = (
    "Un-normalised top-K descends to p(S) = q(S)/e, even from a student that equals its teacher: "
    "the missing tail and the gradient of p(S) push mass out of the teacher's own support. "
    "Renormalised top-K leaves p(S) uncontrolled; a stopped head, a tail bucket and a sampled tail "
    "end at the teacher."
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
    "un-normalised, K = 4, from afar: {}": {
        "quantity": "mass_over_fixed_point",
        "objective": "teacher_topk_unnormalised",
        "start": "afar",
        "k": 4,
    },
    "renormalised, K = 4, from afar: final p(S) / q(S) is {}": {
        "quantity": "mass_over_teacher",
        "objective": "teacher_topk",
        "start": "afar",
        "k": 4,
    },
    "the same from afar for the sampled tail: {}": {
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
    shared = {"prefixes": prefixes, "actions": 32, "iterations": iterations, "rate": 2.0}
    return [{**shared, "start": start, "k": k} for start in ("teacher", "afar") for k in ks]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings((4,), 6, 60),
    "quick": _settings((4, 16), 48, 1000),
    "paper": _settings((1, 4, 16), 100, 3000),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Descent on the expected loss of many prefixes at once, each with free logits of its own.

    The expectation over the sampled token is a sum over all of them: prefixes are states, and every
    token of every state is one response of length 1. A prefix is a repetition, its index the seed.
    """
    s, a = setting["prefixes"], setting["actions"]
    teacher = 2 * torch.randn(s, a, generator=generator, dtype=torch.float64)
    offset = 2 * torch.randn(s, a, generator=generator, dtype=torch.float64)
    start = teacher if setting["start"] == "teacher" else teacher + offset
    marks = sorted({0, *(round(setting["iterations"] ** (i / 24)) for i in range(25))})
    rows: list[Row] = []
    about = {key: setting[key] for key in ("start", "k")}
    for name in NAMES:
        objective = factory.make(name, allow_collapse=True)
        student = start.clone()
        for iteration in range(setting["iterations"] + 1):
            if iteration in marks:
                at = {**about, "objective": name, "iteration": iteration}
                rows += [at | numbers for numbers in observed(student, teacher, setting["k"])]
            gradient = expected(student, teacher, objective, setting["k"])
            student = student - setting["rate"] * gradient
    return rows


def observed(student: torch.Tensor, teacher: torch.Tensor, k: int) -> list[Row]:
    """By prefix: p(S), its ratio to q(S)/e and to q(S), full reverse KL, entropy of the student."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    ids = teacher.topk(k, -1).indices
    ours, theirs = p.gather(-1, ids).sum(-1), q.gather(-1, ids).sum(-1)
    columns = {
        "seed": torch.arange(len(p)),
        "mass": ours,
        "mass_over_fixed_point": ours * math.e / theirs,
        "mass_over_teacher": ours / theirs,
        "kl": (p * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1),
        "entropy": -(p * student.log_softmax(-1)).sum(-1),
    }
    values = zip(*(x.tolist() for x in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over prefixes, by objective, start, k and iteration.

    `mass`, `kl` and `entropy` at every recorded iteration; at the last one, without it as a key,
    `mass_over_fixed_point`, `mass_over_teacher` and `final_kl`. Intervals resample prefixes.
    """
    parts = [interval(rows, name, KEYS, np.mean) for name in ("mass", "kl", "entropy")]
    last = rows[rows["iteration"] == rows["iteration"].max()].drop(columns="iteration")
    last = last.assign(final_kl=last["kl"])
    names = ("mass_over_fixed_point", "mass_over_teacher", "final_kl")
    parts += [interval(last, name, KEYS, np.mean) for name in names]
    return pd.concat(parts, ignore_index=True)
