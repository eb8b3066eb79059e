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

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.catalogue import (
    COLLAPSING,
    FORMS,
    KNOWN_ERRORS,
    OBJECTIVES,
    SUPPORTS,
    Objective,
    full_forward_kl,
    full_jsd,
    full_reverse_kl,
    full_sampled_future,
    k1,
    kl_advantage,
    local,
    mean_future,
    sampled_token,
    sampled_token_clipped,
    sampled_token_weighted,
)
from opd.objectives.credit import (
    ADVANTAGES,
    BASELINES,
    MASK_SCOPES,
    RATIOS,
    check_gamma,
    clipped_cost,
    reward_cost,
)
from opd.objectives.reduction import (
    DENOMINATORS,
    group_mean,
    reduce,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from opd.objectives.surrogates import plain_score

__all__ = [
    "COLLAPSING",
    "DENOMINATORS",
    "FORMS",
    "KNOWN_ERRORS",
    "OBJECTIVES",
    "SUPPORTS",
    "Objective",
    "full_forward_kl",
    "full_jsd",
    "full_reverse_kl",
    "full_sampled_future",
    "group_mean",
    "k1",
    "kl_advantage",
    "local",
    "make_objective",
    "mean_future",
    "reduce",
    "sampled_token",
    "sampled_token_clipped",
    "sampled_token_weighted",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
]


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
        name: One of OBJECTIVES.
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
    _check_names(name, baseline, ratio, reward_baseline, mask_scope)
    _check_collapse(name, allow_collapse)
    check_gamma(gamma)
    if support_k < 1:
        raise InvalidInput(f"support_k is {support_k}; a support needs at least 1 id")
    objective = _construct(name, gamma, beta, clip)
    if baseline != "none":
        objective = _with_baseline(name, objective, baseline)
    if ratio_clip != math.inf:
        objective = _with_clipped_ratios(name, objective, ratio_clip)
    if reward_weight:
        objective = _with_reward(name, objective, reward_weight, reward_baseline)
    elif reward_baseline != "leave_one_out":
        raise InvalidInput(
            f"reward_baseline {reward_baseline!r} has no effect without a reward_weight"
        )
    if ratio == "token" and not objective.sampled:
        raise InvalidInput(
            f"{name} does not read the sampled token, so ratio 'token' would only add noise; "
            "use ratio 'sequence', which reweights the prefixes"
        )
    if mask_scope == "loss" and not _counts_masked_costs(objective, baseline):
        raise InvalidInput(
            f"{name} at gamma = {objective.gamma} with baseline {baseline!r} does not use the "
            "costs of other tokens, so mask_scope 'loss' would have no effect; use 'cost'"
        )
    return replace(objective, ratio=RATIOS[ratio], mask_scope=mask_scope, support_k=support_k)


def _counts_masked_costs(objective: Objective, baseline: str) -> bool:
    """Return whether a supervised token's credit may contain the cost of an unsupervised token."""
    averages_over_responses = baseline not in ("none", "local_kl", "given")
    return objective.gamma > 0 or (averages_over_responses and objective.sampled_own)


def _check_names(
    name: str, baseline: str, ratio: str, reward_baseline: str, mask_scope: str
) -> None:
    """Refuse known errors and unknown names."""
    if name in KNOWN_ERRORS:
        raise InvalidInput(f"{name} is a known error: {KNOWN_ERRORS[name][1]}; use sampled_token")
    for kind, value, known_names in (
        ("objective", name, OBJECTIVES),
        ("baseline", baseline, BASELINES),
        ("ratio", ratio, RATIOS),
        ("reward_baseline", reward_baseline, ADVANTAGES),
        ("mask scope", mask_scope, MASK_SCOPES),
    ):
        if value not in known_names:
            raise InvalidInput(f"unknown {kind} {value!r}; known: {', '.join(known_names)}")


def _check_collapse(name: str, allow_collapse: bool) -> None:
    """Refuse a form whose minimum is not the teacher, unless collapse is allowed."""
    for suffix, reason in COLLAPSING.items():
        if name.endswith(suffix) and not allow_collapse:
            stem = name.removesuffix(suffix)
            raise InvalidInput(
                f"{name} collapses: {reason}; use {stem}, {stem}_bucket or the unbiased "
                f"{stem}_sampled_tail, or pass allow_collapse=True"
            )


def _construct(
    name: str, gamma: float, beta: float | None, clip: tuple[float, float, float] | None
) -> Objective:
    """Call the objective's constructor with the options that were set; refuse unknown ones."""
    constructor = OBJECTIVES[name]
    parameters = inspect.signature(constructor).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parameter_names = {"gamma", "beta", "clip"} if takes_any else set(parameters)
    choices = {"gamma": gamma or None, "beta": beta, "clip": clip}
    options = {option: value for option, value in choices.items() if value is not None}
    for option, value in options.items():
        if option == "gamma" and option not in parameter_names:
            raise InvalidInput(
                f"{name} is local, so gamma = {value} would have no effect; use gamma = 0"
            )
        if option not in parameter_names:
            raise InvalidInput(f"{option} = {value} would have no effect on {name}")
    return constructor(**options)


def _with_baseline(name: str, objective: Objective, baseline: str) -> Objective:
    """Return the objective with a baseline subtracted from its credit."""
    if not objective.scores_credit:
        raise InvalidInput(
            f"{name} at gamma = {objective.gamma} has no credit from which to subtract the "
            f"baseline {baseline!r}; use baseline 'none'"
        )
    if baseline == "local_kl" and not objective.sampled_own:
        raise InvalidInput(
            f"{name} computes the token's own cost in closed form, not in its credit; baseline "
            "'local_kl', the mean of that cost, would only add noise"
        )
    distributions = objective.distributions or baseline == "local_kl"
    return replace(
        objective,
        baseline=BASELINES[baseline],
        distributions=distributions,
        whole_groups=baseline in ("position_mean", "leave_one_out"),
    )


def _with_clipped_ratios(name: str, objective: Objective, limit: float) -> Objective:
    """Return the objective with its sampled costs and the log-ratios of its local part clipped."""
    if not limit > 0:
        raise InvalidInput(f"ratio_clip is {limit}; it must be a positive number of nats")
    later_cost_sampled = objective.sampled_later and objective.gamma > 0
    if not (objective.sampled_own or later_cost_sampled or objective.takes_limit):
        raise InvalidInput(
            f"{name} at gamma = {objective.gamma} has no sampled cost in its credit and no "
            f"log-ratio that can be clipped; ratio_clip = {limit} would have no effect"
        )
    cost = partial(clipped_cost, limit=limit)
    surrogate: Callable[..., Tensor] = objective.local
    return replace(
        objective,
        local=partial(surrogate, limit=limit) if objective.takes_limit else surrogate,
        own_cost=cost if objective.sampled_own else objective.own_cost,
        later_cost=cost if objective.sampled_later else objective.later_cost,
    )


def _with_reward(name: str, objective: Objective, weight: float, reward_baseline: str) -> Objective:
    """Return the objective with a reward in its credit and a score function that carries it."""
    if not (math.isfinite(weight) and weight > 0):
        raise InvalidInput(f"reward_weight is {weight}; the weight of the reward must be positive")
    return replace(
        objective,
        reward_cost=partial(reward_cost, weight=weight, advantage=ADVANTAGES[reward_baseline]),
        score=objective.score if objective.scores_credit else plain_score,
        scores_credit=True,
        sampled=True,
        importance_weighted=objective.importance_weighted,
        normalised=True,
        whole_groups=True,
    )
