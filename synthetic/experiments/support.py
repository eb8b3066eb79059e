"""Gradient of each top-K support compared with that of the full reverse KL, by p(S)."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opd.objectives import factory
from synthetic.analysis.summary import interval
from synthetic.sampling.free_logits import expected_gradients

CLAIM = (
    "A small support loses most of the gradient. Un-normalised top-K points away from the full "
    "gradient where the support has little student mass; renormalised top-K does not depend on "
    "that mass, which drifts; a tail bucket loses least, and a sampled tail is unbiased."
)
FORMS = {
    "renormalised": "",
    "and_sampled": "_and_sampled",
    "unnormalised": "_unnormalised",
    "stopped": "_stopped",
    "bucket": "_bucket",
    "sampled_tail": "_sampled_tail",
    "published_tail": "_published_tail",
}
KS = (1, 2, 4, 8, 16, 32)
MASSES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1.0)
"""Edges of the bins of p(S)."""
KEYS = ["form", "source", "k", "mass"]


def _cosine(form: str, k: int) -> dict[str, Any]:
    return {"quantity": "cosine", "form": form, "source": "teacher", "k": k}


HEADLINES: dict[str, dict[str, Any]] = {
    "cosine with the full gradient, teacher's top 4 of 64, un-normalised: {}": _cosine(
        "unnormalised", 4
    ),
    "stopped head: {}": _cosine("stopped", 4),
    "renormalised: {}": _cosine("renormalised", 4),
    "tail bucket: {}": _cosine("bucket", 4),
    "sampled tail: {}": _cosine("sampled_tail", 4),
    "top 16, un-normalised: {}": _cosine("unnormalised", 16),
    "top 16, renormalised: {}": _cosine("renormalised", 16),
    "top 16, tail bucket: {}": _cosine("bucket", 16),
    "student's top 4, renormalised: {}": _cosine("renormalised", 4) | {"source": "student"},
}


def _settings(seeds: int, prefixes: int) -> list[dict[str, Any]]:
    sizes = {"prefixes": prefixes, "actions": 64, "sharpness": 1.5, "distance": 1.0}
    return [{**sizes, "seed": seed} for seed in range(seeds)]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, 20),
    "quick": _settings(20, 100),
    "paper": _settings(50, 400),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Compute means over random prefixes, overall and by bin of p(S), of one set of prefixes.

    Columns: `cosine` of the expected gradient with that of the full KL (0 where it vanishes);
    `length`, its norm per unit of the full gradient's norm; `drift`, -<grad p(S), gradient>, the
    first-order change of p(S) in descent, in the same unit; `full_drift`, the same for the full
    gradient; `support_mass`, p(S).

    Args:
        setting: One of `SETTINGS`.
        generator: Source of randomness.

    Returns:
        Rows by source, k, form and bin.
    """
    s, a = setting["prefixes"], setting["actions"]
    student = setting["sharpness"] * torch.randn(s, a, generator=generator, dtype=torch.float64)
    offset = torch.randn(s, a, generator=generator, dtype=torch.float64)
    teacher = student + setting["distance"] * setting["sharpness"] * offset
    p, full = (
        student.softmax(-1),
        expected_gradients(student, teacher, factory.make_objective("full_reverse_kl"), None),
    )
    rows: list[Row] = []
    for source, table in (("teacher", teacher), ("student", student)):
        for k in KS:
            inside = torch.zeros_like(p).scatter(-1, table.topk(k, -1).indices, 1.0)
            mass = (p * inside).sum(-1)
            grad_mass = p * (inside - mass[:, None])
            for form, suffix in FORMS.items():
                name = f"{source}_topk{suffix}"
                objective = factory.make_objective(name, allow_collapse=True)
                gradient = expected_gradients(student, teacher, objective, k)
                norms = gradient.norm(dim=-1) * full.norm(dim=-1)
                full_norm = full.norm(dim=-1)
                numbers = {
                    "cosine": (gradient * full).sum(-1) / norms.clamp(min=1e-300),
                    "length": gradient.norm(dim=-1) / full_norm,
                    "drift": -(grad_mass * gradient).sum(-1) / full_norm,
                    "full_drift": -(grad_mass * full).sum(-1) / full_norm,
                    "support_mass": mass,
                }
                labels = {"seed": setting["seed"], "form": form, "source": source, "k": k}
                rows += _binned(labels, numbers, mass)
    return rows


def _binned(labels: Row, numbers: dict[str, Tensor], mass: Tensor) -> list[Row]:
    """Return one row of means over all prefixes, and one of sums for each non-empty bin of p(S)."""
    means = {name: float(x.mean()) for name, x in numbers.items()}
    rows = [{**labels, "bin": -1, "count": len(mass), **means}]
    bin_index = torch.bucketize(mass, torch.tensor(MASSES[1:-1], dtype=mass.dtype))
    for i in bin_index.unique().tolist():
        in_bin = bin_index == i
        sums = {name: float(x[in_bin].sum()) for name, x in numbers.items()}
        rows.append({**labels, "bin": i, "count": int(in_bin.sum()), **sums})
    return rows


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over prefixes as means by form, source and k, and by form, source and bin of p(S).

    The latter pool all k as totals over counts, and have the bin's centre as `mass`. Intervals
    resample sets of prefixes.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    unbinned = rows[rows["bin"] < 0]
    names = ("cosine", "length", "drift", "full_drift", "support_mass")
    parts = [interval(unbinned, name, KEYS, np.mean) for name in names]
    binned = rows[rows["bin"] >= 0]
    summed = binned.groupby(["seed", "form", "source", "bin"], as_index=False)[
        ["count", "cosine", "drift", "full_drift"]
    ].sum()
    num_seeds = summed.groupby(["form", "source", "bin"])["seed"].transform("nunique")
    summed = summed[num_seeds == rows["seed"].nunique()]
    middle = (np.array(MASSES[1:]) + np.array(MASSES[:-1])) / 2
    for name in ("cosine", "drift", "full_drift"):
        by_mass = summed.assign(
            **{f"{name}_by_mass": summed[name] / summed["count"], "mass": middle[summed["bin"]]}
        )
        parts.append(interval(by_mass, f"{name}_by_mass", KEYS, np.mean))
    return pd.concat(parts, ignore_index=True)
