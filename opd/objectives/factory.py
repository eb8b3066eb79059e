"""Build an objective by name, with its baseline, importance ratio, clip and reward.

An objective consists of three parts. The **credit** assigns token costs to the tokens that caused
them (once per optimizer step, over the whole batch, no gradient; `opd.objectives.credit`). The
**surrogate** turns the credit into a loss whose gradient is the estimate (token by token, with
gradient; `opd.objectives.surrogates`). The **reduction** divides by an explicit denominator
(`opd.objectives.reduction`). The functions are pure and shared by the exact study and the training
of language models.

Named objectives are in `OBJECTIVES` (`opd.objectives.catalogue`), reductions in `DENOMINATORS`.
`make_objective` validates the combination before training.
"""

import math
from dataclasses import replace
from functools import partial

from diagnostics.errors import InvalidInput
from diagnostics.io.user_functions import is_function_name
from opd.objectives.catalogue import COLLAPSING, CONTROLS, KNOWN_ERRORS, OBJECTIVES
from opd.objectives.credit import (
    ADVANTAGES,
    BASELINES,
    MASK_SCOPES,
    RATIOS,
    Cost,
    check_gamma,
    clipped_cost,
    reward_cost,
)
from opd.objectives.objective import Objective
from opd.objectives.user_loss import load_user_loss


def make_objective(
    name: str,
    *,
    gamma: float = 0.0,
    baseline: str = "none",
    ratio: str = "none",
    support_k: int = 16,
    beta: float | None = None,
    clip: tuple[float, float, float] | None = None,
    ratio_clip: float = math.inf,
    reward_weight: float = 0.0,
    reward_baseline: str = "leave_one_out",
    mask_scope: str = "cost",
    allow_collapse: bool = False,
) -> Objective:
    """Build the objective called `name`; refuse options without effect and known errors.

    Args:
        name: One of OBJECTIVES or CONTROLS, or a loss of your own (`opd.objectives.user_loss`),
            MODULE:FUNCTION or FILE.py:FUNCTION, which takes none of the options but `support_k`.
        gamma: Discount of later costs, in [0, 1].
        baseline: One of BASELINES in `opd.objectives.credit`.
        ratio: One of RATIOS in `opd.objectives.credit`.
        support_k: K, the ids per model of a top-K support.
        beta: Mixture weight of full_jsd; None for 0.5.
        clip: (low, high, dual) of sampled_token_clipped; None for its default.
        ratio_clip: Nats within which the sampled tokens' costs are clipped (`clipped_cost`), and
            the log-ratios of a reverse KL on a support or on the whole vocabulary.
        reward_weight: Weight of the reward: reward_weight * E[reward] is subtracted from what is
            minimised. Every objective accepts one: its own score function carries it, or a plain
            score function is added.
        reward_baseline: One of ADVANTAGES in `opd.objectives.credit`.
        mask_scope: One of MASK_SCOPES in `opd.objectives.credit`. All are the same without a mask,
            or at gamma = 0 with a baseline that does not average over other responses.
        allow_collapse: Accept a form in COLLAPSING, to study it.

    Returns:
        The objective.

    Raises:
        InvalidInput: A name is unknown, a number is out of range, an option would have no effect or
            only add noise, the objective is a known error, or its form collapses.
    """
    if support_k < 1:
        raise InvalidInput(f"support_k is {support_k}; a support needs at least 1 id")
    if is_function_name(name):
        options = {
            "gamma": (gamma, 0.0),
            "baseline": (baseline, "none"),
            "ratio": (ratio, "none"),
            "beta": (beta, None),
            "clip": (clip, None),
            "ratio_clip": (ratio_clip, math.inf),
            "reward_weight": (reward_weight, 0.0),
            "reward_baseline": (reward_baseline, "leave_one_out"),
            "mask_scope": (mask_scope, "cost"),
        }
        for option, (value, default) in options.items():
            if value != default:
                raise InvalidInput(
                    f"{option} is {value!r}, which would have no effect on {name}, a loss of your "
                    f"own; write it into the function, and leave {option} at {default!r}"
                )
        return Objective(user_loss=load_user_loss(name), support_k=support_k)
    _check_names(name, baseline, ratio, reward_baseline, mask_scope)
    _check_collapse(name, allow_collapse)
    check_gamma(gamma)
    objective = _with_gamma(name, {**OBJECTIVES, **CONTROLS}[name], gamma)
    if beta is not None:
        objective = _with_beta(name, objective, beta)
    if clip is not None:
        objective = _with_clip(name, objective, clip)
    if baseline != "none":
        objective = _with_baseline(name, objective, baseline)
    if ratio_clip != math.inf:
        objective = _with_clipped_ratios(name, objective, ratio_clip)
    if reward_weight:
        objective = _with_reward(objective, reward_weight, reward_baseline)
    elif name == "reward_only":
        raise InvalidInput(
            "reward_only trains on the reward alone, but reward_weight is 0; set it, such as to 1"
        )
    elif reward_baseline != "leave_one_out":
        raise InvalidInput(
            f"reward_baseline {reward_baseline!r} has no effect without a reward_weight"
        )
    if ratio == "token" and not objective.requirements.sampled_logp:
        raise InvalidInput(
            f"{name} does not read the sampled token, so ratio 'token' would only add noise; "
            "use ratio 'sequence', which reweights the prefixes"
        )
    if mask_scope == "loss" and not _counts_masked_costs(objective):
        raise InvalidInput(
            f"{name} at gamma = {objective.gamma} with baseline {baseline!r} does not use the "
            "costs of other tokens, so mask_scope 'loss' would have no effect; use 'cost'"
        )
    return replace(objective, ratio=RATIOS[ratio], mask_scope=mask_scope, support_k=support_k)


def _counts_masked_costs(objective: Objective) -> bool:
    """Return whether a supervised token's credit may contain the cost of an unsupervised token."""
    averages_costs = objective.baseline.whole_groups and objective.own_cost.sampled
    return objective.gamma > 0 or averages_costs


def _check_names(
    name: str, baseline: str, ratio: str, reward_baseline: str, mask_scope: str
) -> None:
    """Refuse known errors and unknown names."""
    if name in KNOWN_ERRORS:
        raise InvalidInput(f"{name} is a known error: {KNOWN_ERRORS[name][1]}; use sampled_token")
    for kind, value, known_names in (
        ("objective", name, {**OBJECTIVES, **CONTROLS}),
        ("baseline", baseline, BASELINES),
        ("ratio", ratio, RATIOS),
        ("reward_baseline", reward_baseline, ADVANTAGES),
        ("mask scope", mask_scope, MASK_SCOPES),
    ):
        if value not in known_names:
            own = ", or your own FILE.py:FUNCTION" * (kind == "objective")
            raise InvalidInput(f"unknown {kind} {value!r}; known: {', '.join(known_names)}{own}")


def _check_collapse(name: str, allow_collapse: bool) -> None:
    """Refuse a form whose minimum is not the teacher, unless collapse is allowed."""
    for suffix, reason in COLLAPSING.items():
        if name.endswith(suffix) and not allow_collapse:
            stem = name.removesuffix(suffix)
            raise InvalidInput(
                f"{name} collapses: {reason}; use {stem}, {stem}_bucket or the unbiased "
                f"{stem}_sampled_tail, or pass allow_collapse=True"
            )


def _with_gamma(name: str, objective: Objective, gamma: float) -> Objective:
    """Return the objective with a discount of later costs."""
    if gamma and objective.later_cost.is_zero:
        raise InvalidInput(
            f"{name} is local, so gamma = {gamma} would have no effect; use gamma = 0"
        )
    return replace(objective, gamma=gamma)


def _with_beta(name: str, objective: Objective, beta: float) -> Objective:
    """Return the objective with the weight of the teacher in its mixture."""
    if not objective.local.mixture:
        raise InvalidInput(f"beta = {beta} would have no effect on {name}")
    if not 0 <= beta <= 1:
        raise InvalidInput(f"beta is {beta}; it must lie in [0, 1], 0 forward and 1 reverse KL")
    mixture = partial(objective.local.surrogate, beta=beta)
    return replace(objective, local=replace(objective.local, surrogate=mixture))


def _with_clip(name: str, objective: Objective, clip: tuple[float, float, float]) -> Objective:
    """Return the objective with (low, high, dual) as the clip of its importance ratio."""
    if not objective.score.clippable:
        raise InvalidInput(f"clip = {clip} would have no effect on {name}")
    low, high, dual = clip
    if not (0 < low < 1 and high > 0 and dual > 1 + high):
        raise InvalidInput(
            f"clip is {clip}; it must be (low, high, dual) with 0 < low < 1, high > 0 and "
            "dual > 1 + high"
        )
    clipped = partial(objective.score.function, low=low, high=high, dual=dual)
    return replace(objective, score=replace(objective.score, function=clipped))


def _with_baseline(name: str, objective: Objective, baseline: str) -> Objective:
    """Return the objective with a baseline subtracted from its credit."""
    if not objective.has_credit:
        raise InvalidInput(
            f"{name} at gamma = {objective.gamma} has no credit from which to subtract the "
            f"baseline {baseline!r}; use baseline 'none'"
        )
    if baseline == "local_kl" and not objective.own_cost.sampled:
        raise InvalidInput(
            f"{name} computes the token's own cost in closed form, not in its credit; baseline "
            "'local_kl', the mean of that cost, would only add noise"
        )
    return replace(objective, baseline=BASELINES[baseline])


def _with_clipped_ratios(name: str, objective: Objective, limit: float) -> Objective:
    """Return the objective with its sampled costs and the log-ratios of its local part clipped."""
    if not limit > 0:
        raise InvalidInput(f"ratio_clip is {limit}; it must be a positive number of nats")
    local = objective.local
    if not (local.clippable or any(cost.sampled for cost in objective.costs)):
        raise InvalidInput(
            f"{name} at gamma = {objective.gamma} has no sampled cost in its credit and no "
            f"log-ratio that can be clipped; ratio_clip = {limit} would have no effect"
        )

    def clipped(cost: Cost) -> Cost:
        if not cost.sampled:
            return cost
        return replace(cost, function=partial(clipped_cost, limit=limit))

    if local.clippable:
        local = replace(local, surrogate=partial(local.surrogate, limit=limit))
    return replace(
        objective,
        local=local,
        own_cost=clipped(objective.own_cost),
        later_cost=clipped(objective.later_cost),
    )


def _with_reward(objective: Objective, weight: float, reward_baseline: str) -> Objective:
    """Return the objective with a reward in its credit."""
    if not (math.isfinite(weight) and weight > 0):
        raise InvalidInput(f"reward_weight is {weight}; the weight of the reward must be positive")
    cost = partial(reward_cost, weight=weight, advantage=ADVANTAGES[reward_baseline])
    return replace(objective, reward_cost=cost)
