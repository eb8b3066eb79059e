"""All estimators compared by relative bias, cosine and variance with the sequence-KL gradient."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.estimators import FAMILY, LOCAL
from synthetic.exact import moments
from synthetic.worlds.mdp import nucleus_probabilities, random_chain, random_pair, with_end_state

CLAIM = (
    "Of all estimators in use, only sequence-level ones are unbiased for the sequence KL. Local "
    "ones with the teacher's full distribution share the bias of gamma = 0; top-K supports add "
    "further bias; k1 and an action-independent advantage have zero mean at gamma = 0; k3 "
    "estimates another divergence; top-p or temperature sampling biases all of them unless it is "
    "corrected."
)
K, GROUP = 2, 8
KEYS = ["estimator", "gamma", "sampler", "ratio", "length"]
PLAIN = {"sampler": "student", "ratio": "none", "length": "sequence_sum"}


def _row_keys(quantity: str, estimator: str, gamma: float, **overrides: str) -> dict[str, Any]:
    return {"quantity": quantity, "estimator": estimator, "gamma": gamma, **PLAIN, **overrides}


HEADLINES: dict[str, dict[str, Any]] = {
    "relative bias of gamma = 0: {}": _row_keys("bias", "plain", 0.0),
    "of the teacher's top 2 of 8, renormalised: {}": _row_keys("bias", "teacher_topk", 0.0),
    "un-normalised: {}": _row_keys("bias", "teacher_topk_unnormalised", 0.0),
    "of k3 differentiated: {}": _row_keys("bias", "k3", 0.0),
    "of k1 differentiated: {}": _row_keys("bias", "k1", 0.0),
    "of gamma = 0 under top-p 0.9: {}": _row_keys("bias", "plain", 0.0, sampler="top_p 0.9"),
    "of gamma = 1 under top-p 0.9: {}": _row_keys("bias", "plain", 1.0, sampler="top_p 0.9"),
    "the same with sequence importance weights: {}": _row_keys(
        "bias", "plain", 1.0, sampler="top_p 0.9", ratio="sequence"
    ),
    "of gamma = 1 at temperature 0.7: {}": _row_keys(
        "bias", "plain", 1.0, sampler="temperature 0.7"
    ),
    "with sequence weights it is unbiased; variance relative to plain sampling: {}": _row_keys(
        "variance_ratio", "plain", 1.0, sampler="temperature 0.7", ratio="sequence"
    ),
    "cosine of the per-response mean at gamma = 1: {}": _row_keys(
        "cosine", "plain", 1.0, length="sequence_mean"
    ),
}


def _settings(draws: int, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    sizes = dict(zip(("states", "actions", "horizon"), shape, strict=True))
    return [{**sizes, "stop": 0.02, "seed": seed} for seed in range(draws)]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, (3, 3, 8)),
    "quick": _settings(20, (8, 8, 64)),
    "paper": _settings(50, (16, 16, 128)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Compute bias, cosine and variance of all estimators in one world with random lengths."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    chain = random_chain(*shape, generator, mixing=0.1)
    mdp = with_end_state(chain, torch.tensor(setting["stop"]))
    student, teacher = random_pair(mdp, generator, 1.0, 0.5)
    truth = moments.expected_gradient(mdp, student, teacher, 1.0)
    samplers = {
        "top_p 0.9": nucleus_probabilities(student, 0.9),
        "temperature 0.7": nucleus_probabilities(student, 1.0, 0.7),
    }

    def compare(names: Sequence[str], gammas: tuple[float, ...], **options: str) -> list[Row]:
        options = PLAIN | options
        means, variances = moments.moments(
            mdp,
            student,
            teacher,
            names,
            gammas,
            k=K,
            group=GROUP if "leave_one_out" in names else None,
            sampler=samplers.get(options["sampler"]),
            ratio=options["ratio"],
            length=options["length"],
        )
        return [
            {"estimator": name, "gamma": gamma, "seed": setting["seed"]}
            | options
            | compare_to_gradient(means[i, j], variances[i, j], truth)
            for i, name in enumerate(names)
            for j, gamma in enumerate(gammas)
        ]

    family = compare((*FAMILY, "kl_advantage"), (0.0, 0.9, 1.0))
    by_length = compare(("plain",), (0.0, 0.9, 1.0), length="sequence_mean")
    rows = family[:-3]
    for pair in zip(family[-3:], by_length, strict=True):
        rows += pair
    rows += compare(tuple(LOCAL), (0.0,))
    for sampler in samplers:
        for ratio in ("none", "token", "sequence"):
            rows += compare(("plain",), (0.0, 1.0), sampler=sampler, ratio=ratio)
    plain = next(r["variance"] for r in rows if r["estimator"] == "plain" and r["gamma"] == 1)
    return [row | {"variance_ratio": row["variance"] / plain} for row in rows]


def compare_to_gradient(mean: torch.Tensor, variance: torch.Tensor, truth: torch.Tensor) -> Row:
    """Compare an estimator's moments with the exact gradient of the sequence KL.

    Args:
        mean: (S, A) expected estimate E g.
        variance: () total variance of one trajectory's estimate.
        truth: (S, A) exact gradient grad J.

    Returns:
        Relative bias |E g - grad J| / |grad J|; cosine (0 for a zero mean); variance / |grad J|^2;
        and length ratio |E g| / |grad J|.
    """
    truth_norm = truth.norm()
    mean_norm = mean.norm()
    cosine = (
        (mean * truth).sum() / (mean_norm * truth_norm)
        if mean_norm > 1e-12 * truth_norm
        else mean.new_zeros(())
    )
    return {
        "bias": float((mean - truth).norm() / truth_norm),
        "cosine": float(cosine),
        "length_ratio": float(mean_norm / truth_norm),
        "variance": float(variance / truth_norm**2),
    }


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise over worlds as medians of `bias`, `cosine`, `length_ratio` and the variances.

    `variance_ratio` is relative to the variance of the plain estimator at gamma = 1 in the same
    world. Intervals resample worlds.

    Args:
        rows: Rows of `measure`.

    Returns:
        Table of quantities with intervals.
    """
    names = ("bias", "cosine", "length_ratio", "variance", "variance_ratio")
    parts = [interval(rows, name, KEYS, np.median) for name in names]
    return pd.concat(parts, ignore_index=True)
