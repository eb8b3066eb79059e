"""Exact measurements of the three failure modes in the drift chain, and the effect of training."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.exact import moments
from synthetic.exact.token_weights import (
    masked_moments,
    token_weights,
    top_share,
    weighted_quantiles,
)
from synthetic.worlds.drift_chain import DriftChain, DriftChainConfig, drift_chain

CLAIM = (
    "A rare tag that the teacher rejects carries a large part of the signal and most of the "
    "gradient's noise; masking it removes both, and a top-K support does not contain it. Where the "
    "teacher repeats as the student does, the loop costs nothing: the token-level objective hardly "
    "resists entering it, and the sequence-level one temporarily enters it during training, since "
    "a looping token saves the cost of an ordinary one. A tabular student leaves it again as it "
    "approaches the teacher. The signal's spread grows with position where the teacher is "
    "confident in tokens of its own, and late tokens of random-length responses are mostly loops."
)
GAMMAS = (0.0, 0.5, 0.9, 1.0)
CHAIN = ["uninformed", "enter", "distance", "stop"]
KEYS = [*CHAIN, "gamma", "position", "iteration", "k"]
_FLAT: dict[str, Any] = {"uninformed": "flat", "enter": 0.02, "distance": 0.7, "stop": 0.0}
HEADLINES: dict[str, dict[str, Any]] = {
    "share of tokens with a negative signal: {}": {"quantity": "negative_share", **_FLAT},
    "share of |signal| in the top 1 % of tokens: {}": {"quantity": "top1_share", **_FLAT},
    "of the positive signal in the top 1 % of the tokens that have one: {}": {
        "quantity": "positive_top1_share",
        **_FLAT,
    },
    "share of the special tag in |signal|: {}": {"quantity": "special_share", **_FLAT},
    "the same, teacher twice as far: {}": {
        "quantity": "special_share",
        **_FLAT,
        "distance": 1.4,
    },
    "5 to 95 % band of the signal, last step over first, flat teacher: {}": {
        "quantity": "band_growth",
        **_FLAT,
    },
    "a teacher confident in tokens of its own: {}": {
        "quantity": "band_growth",
        **_FLAT,
        "uninformed": "sure",
    },
    "random lengths: share of loop tokens at the last step: {}": {
        "quantity": "late_loop",
        **_FLAT,
        "stop": 0.02,
    },
    "variance at gamma = 0 with the tag over without it: {}": {
        "quantity": "variance_factor",
        "gamma": 0.0,
        **_FLAT,
    },
    "at gamma = 1: {}": {"quantity": "variance_factor", "gamma": 1.0, **_FLAT},
    "cosine of the gradients at gamma = 0 with and without the tag: {}": {
        "quantity": "tag_cosine",
        "gamma": 0.0,
        **_FLAT,
    },
    "the same for the teacher's top 4: {}": {"quantity": "topk_tag_cosine", "k": 4, **_FLAT},
    "mean gradient of the entering logits without the tag, gamma = 0: {}": {
        "quantity": "enter_gradient",
        "gamma": 0.0,
        **_FLAT,
    },
    "gamma = 1 (negative: descent increases the loop): {}": {
        "quantity": "enter_gradient",
        "gamma": 1.0,
        **_FLAT,
    },
    "the same with the tag, gamma = 0: {}": {
        "quantity": "enter_gradient_tagged",
        "gamma": 0.0,
        **_FLAT,
    },
    "mass in the loop at the last step before training: {}": {"quantity": "loop_start", **_FLAT},
    "after training with gamma = 0: {}": {"quantity": "loop_end", "gamma": 0.0, **_FLAT},
    "after training with gamma = 1: {}": {"quantity": "loop_end", "gamma": 1.0, **_FLAT},
}


CHAINS: list[dict[str, Any]] = [
    *(_FLAT | {"enter": enter} for enter in (0.005, 0.02, 0.05)),
    *(_FLAT | {"uninformed": kind} for kind in ("copies", "sure")),
    *(_FLAT | {"distance": distance} for distance in (0.35, 1.4)),
    _FLAT | {"stop": 0.02},
]
"""Chain settings: each differs from `_FLAT` in at most one value."""


def _settings(seeds: int, horizon: int, iterations: int) -> list[dict[str, Any]]:
    options = {"horizon": horizon, "iterations": iterations, "rate": 0.02}
    return [{"seed": seed, **chain, **options} for chain in CHAINS for seed in range(seeds)]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, 8, 4),
    "quick": _settings(8, 64, 150),
    "paper": _settings(20, 64, 600),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Measure signal, drift, gradients and training of one random chain; all values are exact."""
    chain_setting = {key: setting[key] for key in CHAIN}
    config = DriftChainConfig(
        **chain_setting, horizon=setting["horizon"], teacher_enter=0.75 * setting["enter"]
    )
    chain = drift_chain(config, generator)
    labels = {"seed": setting["seed"], **chain_setting}
    rows = [signal_metrics(chain), *position_metrics(chain), *gradient_metrics(chain)]
    rows += training_metrics(chain, setting["iterations"], setting["rate"])
    return [labels | row for row in rows]


def signal_metrics(chain: DriftChain) -> Row:
    """Measure the imbalance of one-token signals; the signal of a token with cost r is -r."""
    weight, cost = token_weights(chain)
    token_weight = weight.sum(0) / weight.sum()
    signal_mass, positive = token_weight * cost.abs(), token_weight * (cost < 0)
    band = [
        high - low
        for low, high in (weighted_quantiles(x, -cost, (0.05, 0.95)) for x in weight[[0, -1]])
    ]
    return {
        "negative_share": float((token_weight * (cost > 0)).sum()),
        "top1_share": top_share(token_weight, cost.abs(), 0.01),
        "positive_top1_share": top_share(positive, cost.abs(), 0.01),
        "special_share": float(signal_mass[:, chain.special_token].sum() / signal_mass.sum()),
        "band_growth": band[1] / band[0],
        "late_loop": float(weight[-1, chain.loop].sum() / weight[-1].sum()),
    }


def position_metrics(chain: DriftChain) -> list[Row]:
    """Measure signal and states at each step, over the responses that have not ended.

    Args:
        chain: The drift chain.

    Returns:
        One row per step: mean and quantiles of the signal, mass in each region, and the fraction of
        responses that have not ended.
    """
    weight, cost = token_weights(chain)
    rows = []
    for t, token_weight in enumerate(weight):
        low, middle, high = weighted_quantiles(token_weight, -cost, (0.05, 0.5, 0.95))
        active_mass = token_weight.sum()
        state = token_weight.sum(-1) / active_mass
        rows.append(
            {
                "position": t,
                "mean_signal": float((token_weight * -cost).sum() / active_mass),
                "signal_05": low,
                "signal_50": middle,
                "signal_95": high,
                "loop_mass": float(state[chain.loop]),
                "uninformed_mass": float(state[chain.uninformed].sum()),
                "going": float(active_mass),
            }
        )
    return rows


def gradient_metrics(chain: DriftChain) -> list[Row]:
    """Measure the gradient of entering the loop, and the tag's effect on gradients and noise."""
    mdp, student, teacher = chain.mdp, chain.student, chain.teacher
    means, variances = moments.moments(mdp, student, teacher, "plain", GAMMAS)
    untagged_teacher = teacher.clone()
    untagged_teacher[:, chain.special_token] = student[:, chain.special_token]
    # without this, the tag's cost would count against staying outside the loop, where it is drawn
    untagged_gradients = moments.expected_gradient(mdp, student, untagged_teacher, GAMMAS)
    rows: list[Row] = []
    for gamma, mean, variance, untagged_gradient in zip(
        GAMMAS, means, variances, untagged_gradients, strict=True
    ):
        masked_mean, masked_variance = masked_moments(chain, "plain", gamma, chain.special_token)
        entering = untagged_gradient[chain.informed, chain.loop_token].sum()
        rows.append(
            {
                "gamma": gamma,
                "enter_gradient": float(entering),
                "enter_gradient_tagged": float(mean[chain.informed, chain.loop_token].sum()),
                "variance_factor": float(variance / masked_variance),
                "tag_cosine": cosine(mean, masked_mean),
            }
        )
    for k in (2, 4, 6, 8):
        pair = [
            moments.moments(mdp, student, x, "teacher_topk", k=k)[0]
            for x in (teacher, untagged_teacher)
        ]
        rows.append({"k": k, "topk_tag_cosine": cosine(*pair)})
    return rows


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the cosine of the angle between two gradients."""
    return float((left * right).sum() / (left.norm() * right.norm()).clamp(min=1e-300))


def training_metrics(chain: DriftChain, iterations: int, rate: float) -> list[Row]:
    """Run gradient descent on the exact mean gradient of each discount, with bounded step sizes.

    The special tag does not contribute to the policies' difference, which isolates the loop.

    Args:
        chain: The drift chain.
        iterations: Number of updates.
        rate: Step size.

    Returns:
        Rows of sequence KL and loop mass by discount and recorded iteration.
    """
    untagged_teacher = chain.teacher.clone()
    untagged_teacher[:, chain.special_token] = chain.student[:, chain.special_token]
    recorded_iterations = sorted({0, *(round(iterations ** (i / 12)) for i in range(13))})
    mdp, gammas = chain.mdp, torch.tensor(GAMMAS, dtype=torch.float64)
    rows_of_gamma: list[list[Row]] = [[] for _ in GAMMAS]
    students = chain.student.to(torch.float64).repeat(len(GAMMAS), 1, 1)
    for iteration in range(iterations + 1):
        if iteration in recorded_iterations:
            for gamma, rows, student in zip(GAMMAS, rows_of_gamma, students, strict=True):
                divergence = moments.sequence_kl(mdp, student, untagged_teacher)
                mass = float(divergence.occupancy[-1, chain.loop])
                row = {
                    "gamma": gamma,
                    "iteration": iteration,
                    "sequence_kl": float(divergence.total),
                }
                rows.append(row | {"loop_path": mass})
                if iteration == 0 and gamma == 0:
                    rows.append({"loop_start": mass})
                if iteration == iterations:
                    rows.append({"gamma": gamma, "loop_end": mass})
        if iteration < iterations:
            gradients = moments.expected_gradients_of_students(
                mdp, students, untagged_teacher, gammas
            )
            lengths = gradients.flatten(1).norm(dim=1).clamp(min=mdp.horizon)
            students = students - (rate * mdp.horizon / lengths)[:, None, None] * gradients
    return [row for rows in rows_of_gamma for row in rows]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise every quantity over random chains as medians. Intervals resample chains."""
    names = [c for c in rows.columns if c not in ("seed", *KEYS)]
    parts = []
    for name in names:
        for _, group_rows in rows.dropna(subset=[name]).groupby(CHAIN, sort=False):
            parts.append(interval(group_rows, name, KEYS, np.median))
    return pd.concat(parts, ignore_index=True)
