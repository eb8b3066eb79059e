"""The three failure modes in the drift chain, as exact numbers, and what training makes of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from synthetic.analysis.summary import interval
from synthetic.exact import moments
from synthetic.exact.token_weights import masked_moments, quantiles, token_weights, top_share
from synthetic.worlds.drift_chain import DriftChain, DriftChainConfig, drift_chain

CLAIM = (
    "A rare forbidden tag carries a large part of the signal and most of the gradient's noise; "
    "masking it removes both, and a top-K support never sees it. Where the teacher repeats with "
    "the student, the loop costs nothing: token level hardly resists entering it, and sequence "
    "level descends into it on the way, since a looping token saves the cost of an ordinary one. "
    "A tabular student leaves it again as it nears the teacher. Tails widen with position where "
    "the teacher is sure of tokens of its own, and what is left of random lengths is loops."
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
    "a teacher sure of its own tokens: {}": {
        "quantity": "band_growth",
        **_FLAT,
        "uninformed": "sure",
    },
    "random lengths: share of the last step's tokens that are loops: {}": {
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
    "gamma = 1 (negative: descent enters the loop more): {}": {
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
"""One knob at a time around the first chain's."""


def _settings(seeds: int, horizon: int, iterations: int) -> list[dict[str, Any]]:
    how = {"horizon": horizon, "iterations": iterations, "rate": 0.02}
    return [{"seed": seed, **chain, **how} for chain in CHAINS for seed in range(seeds)]


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "smoke": _settings(2, 8, 4),
    "quick": _settings(8, 64, 150),
    "paper": _settings(20, 64, 600),
}

Row = dict[str, Any]


def measure(setting: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Signal, drift, gradients and training of one drawn chain; every number is exact."""
    chosen = {key: setting[key] for key in CHAIN}
    knobs = DriftChainConfig(
        **chosen, horizon=setting["horizon"], teacher_enter=0.75 * setting["enter"]
    )
    chain = drift_chain(knobs, generator)
    about = {"seed": setting["seed"], **chosen}
    rows = [signal(chain), *positions(chain), *gradients(chain)]
    rows += training(chain, setting["iterations"], setting["rate"])
    return [about | row for row in rows]


def signal(chain: DriftChain) -> Row:
    """Lopsided one-token signals: -r is the signal of a token with cost r."""
    weight, cost = token_weights(chain)
    each = weight.sum(0) / weight.sum()
    size, positive = each * cost.abs(), each * (cost < 0)
    band = [
        high - low for low, high in (quantiles(x, -cost, (0.05, 0.95)) for x in weight[[0, -1]])
    ]
    return {
        "negative_share": float((each * (cost > 0)).sum()),
        "top1_share": top_share(each, cost.abs(), 0.01),
        "positive_top1_share": top_share(positive, cost.abs(), 0.01),
        "special_share": float(size[:, chain.special_token].sum() / size.sum()),
        "band_growth": band[1] / band[0],
        "late_loop": float(weight[-1, chain.loop].sum() / weight[-1].sum()),
    }


def positions(chain: DriftChain) -> list[Row]:
    """By step, of the responses that are still going: mean and quantiles of the signal, and the
    mass in each region; and the share of responses that are.
    """
    weight, cost = token_weights(chain)
    rows = []
    for t, each in enumerate(weight):
        low, middle, high = quantiles(each, -cost, (0.05, 0.5, 0.95))
        going = each.sum()
        state = each.sum(-1) / going
        rows.append(
            {
                "position": t,
                "mean_signal": float((each * -cost).sum() / going),
                "signal_05": low,
                "signal_50": middle,
                "signal_95": high,
                "loop_mass": float(state[chain.loop]),
                "uninformed_mass": float(state[chain.uninformed].sum()),
                "going": float(going),
            }
        )
    return rows


def gradients(chain: DriftChain) -> list[Row]:
    """What entering the loop is worth, and what the special tag does to gradient and noise."""
    mdp, student, teacher = chain.mdp, chain.student, chain.teacher
    means, variances = moments.moments(mdp, student, teacher, "plain", GAMMAS)
    spared = teacher.clone()
    spared[:, chain.special_token] = student[:, chain.special_token]
    # the tag's cost would be charged to staying out of the loop, where the tag is drawn
    untagged = moments.expected_gradient(mdp, student, spared, GAMMAS)
    rows: list[Row] = []
    for gamma, mean, variance, alone in zip(GAMMAS, means, variances, untagged, strict=True):
        clean, quiet = masked_moments(chain, "plain", gamma, chain.special_token)
        entering = alone[chain.informed, chain.loop_token].sum()
        rows.append(
            {
                "gamma": gamma,
                "enter_gradient": float(entering),
                "enter_gradient_tagged": float(mean[chain.informed, chain.loop_token].sum()),
                "variance_factor": float(variance / quiet),
                "tag_cosine": cosine(mean, clean),
            }
        )
    for k in (2, 4, 6, 8):
        pair = [moments.moments(mdp, student, x, "teacher_topk", k=k)[0] for x in (teacher, spared)]
        rows.append({"k": k, "topk_tag_cosine": cosine(*pair)})
    return rows


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left * right).sum() / (left.norm() * right.norm()).clamp(min=1e-300))


def training(chain: DriftChain, iterations: int, rate: float) -> list[Row]:
    """Descent on the exact mean gradient of each discount, step sizes bounded by the norm.

    The special tag is left out of both policies' difference, so that the loop alone is at work.
    """
    spared = chain.teacher.clone()
    spared[:, chain.special_token] = chain.student[:, chain.special_token]
    marks = sorted({0, *(round(iterations ** (i / 12)) for i in range(13))})
    rows: list[Row] = []
    for gamma in GAMMAS:
        now = replace(chain, teacher=spared)
        for iteration in range(iterations + 1):
            if iteration in marks:
                at = moments.sequence_kl(now.mdp, now.student, now.teacher)
                mass = float(at.occupancy[-1, chain.loop])
                row = {"gamma": gamma, "iteration": iteration, "sequence_kl": float(at.total)}
                rows.append(row | {"loop_path": mass})
                if iteration == 0 and gamma == 0:
                    rows.append({"loop_start": mass})
                if iteration == iterations:
                    rows.append({"gamma": gamma, "loop_end": mass})
            step = moments.expected_gradient(now.mdp, now.student, now.teacher, gamma)
            scale = rate * now.mdp.horizon / step.norm().clamp(min=now.mdp.horizon)
            now = replace(now, student=now.student - scale * step)
    return rows


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over drawn chains of every number, by its own keys. Intervals resample chains."""
    names = [c for c in rows.columns if c not in ("seed", *KEYS)]
    parts = []
    for name in names:
        for _, mine in rows.dropna(subset=[name]).groupby(CHAIN, sort=False):
            parts.append(interval(mine, name, KEYS, np.median))
    return pd.concat(parts, ignore_index=True)
