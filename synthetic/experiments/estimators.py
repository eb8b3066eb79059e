"""Every estimator on one plane: relative bias, angle and noise against the sequence-KL gradient."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.estimators import FAMILY, LOCAL
from synthetic.exact import moments
from synthetic.worlds.mdp import ending, nucleus, random_chain, random_pair

CLAIM = (
    "Of all estimators in use, only sequence-level ones are unbiased for the sequence KL. Local "
    "ones that see the whole teacher share the bias of gamma = 0; top-K supports add their own; k1 "
    "and an action-independent advantage estimate nothing at gamma = 0; k3 estimates another "
    "divergence; sampling from top-p or a temperature biases all of them unless it is corrected."
)
K, GROUP = 2, 8
KEYS = ["estimator", "gamma", "sampler", "ratio", "length"]
PLAIN = {"sampler": "student", "ratio": "none", "length": "sequence_sum"}


def _at(quantity: str, estimator: str, gamma: float, **other: str) -> dict[str, Any]:
    return {"quantity": quantity, "estimator": estimator, "gamma": gamma, **PLAIN, **other}


HEADLINES: dict[str, dict[str, Any]] = {
    "relative bias of gamma = 0: {}": _at("bias", "plain", 0.0),
    "of the teacher's top 2 of 8, renormalised: {}": _at("bias", "teacher_topk", 0.0),
    "un-normalised: {}": _at("bias", "teacher_topk_unnormalised", 0.0),
    "of k3 differentiated: {}": _at("bias", "k3", 0.0),
    "of k1 differentiated: {}": _at("bias", "k1", 0.0),
    "of gamma = 0 under top-p 0.9: {}": _at("bias", "plain", 0.0, sampler="top_p 0.9"),
    "of gamma = 1 under top-p 0.9: {}": _at("bias", "plain", 1.0, sampler="top_p 0.9"),
    "the same with sequence importance weights: {}": _at(
        "bias", "plain", 1.0, sampler="top_p 0.9", ratio="sequence"
    ),
    "of gamma = 1 at temperature 0.7: {}": _at("bias", "plain", 1.0, sampler="temperature 0.7"),
    "with sequence weights it is unbiased; its variance over the plain one's is {}": _at(
        "variance_ratio", "plain", 1.0, sampler="temperature 0.7", ratio="sequence"
    ),
    "cosine of the per-response mean at gamma = 1: {}": _at(
        "cosine", "plain", 1.0, length="sequence_mean"
    ),
}


def _settings(draws: int, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    shared = dict(zip(("states", "actions", "horizon"), shape, strict=True))
    return [{**shared, "stop": 0.02, "seed": seed} for seed in range(draws)]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, (3, 3, 8)),
    "quick": _settings(20, (8, 8, 64)),
    "paper": _settings(50, (16, 16, 128)),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Bias, cosine and variance of all estimators in one random world with random lengths."""
    shape = (setting["states"], setting["actions"], setting["horizon"])
    chain = random_chain(*shape, generator, mixing=0.1)
    mdp = ending(chain, torch.tensor(setting["stop"]))
    student, teacher = random_pair(mdp, generator, 1.0, 0.5)
    truth = moments.expected_gradient(mdp, student, teacher, 1.0)
    rows: list[Row] = []

    samplers = {"top_p 0.9": nucleus(student, 0.9), "temperature 0.7": nucleus(student, 1.0, 0.7)}

    def add(name: str, gamma: float, **how: str) -> None:
        how = PLAIN | how
        found = moments.moments(
            mdp,
            student,
            teacher,
            name,
            gamma,
            k=K if "topk" in name else None,
            group=GROUP if name == "leave_one_out" else None,
            sampler=samplers.get(how["sampler"]),
            ratio=how["ratio"],
            length=how["length"],
        )
        about = {"estimator": name, "gamma": gamma, "seed": setting["seed"]} | how
        rows.append(about | compared(*found, truth))

    for name in FAMILY:
        for gamma in (0.0, 0.9, 1.0):
            add(name, gamma)
    for gamma in (0.0, 0.9, 1.0):
        add("kl_advantage", gamma)
        add("plain", gamma, length="sequence_mean")
    for name in LOCAL:
        add(name, 0.0)
    for sampler in samplers:
        for ratio in ("none", "token", "sequence"):
            for gamma in (0.0, 1.0):
                add("plain", gamma, sampler=sampler, ratio=ratio)
    plain = next(r["variance"] for r in rows if r["estimator"] == "plain" and r["gamma"] == 1)
    return [row | {"variance_ratio": row["variance"] / plain} for row in rows]


def compared(mean: torch.Tensor, variance: torch.Tensor, truth: torch.Tensor) -> Row:
    """Relative bias |E g - grad J| / |grad J|, cosine, variance / |grad J|^2, |E g| / |grad J|.

    The cosine of a mean of zero is 0.
    """
    size = truth.norm()
    length = mean.norm()
    cosine = (mean * truth).sum() / (length * size) if length > 1e-12 * size else mean.new_zeros(())
    return {
        "bias": float((mean - truth).norm() / size),
        "cosine": float(cosine),
        "length_ratio": float(length / size),
        "variance": float(variance / size**2),
    }


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over worlds of `bias`, `cosine`, `length_ratio`, `variance` and `variance_ratio`.

    The last is over the variance of the plain estimator at gamma = 1 in the same world. Intervals
    resample worlds.
    """
    names = ("bias", "cosine", "length_ratio", "variance", "variance_ratio")
    parts = [interval(rows, name, KEYS, np.median) for name in names]
    return pd.concat(parts, ignore_index=True)
