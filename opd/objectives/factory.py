"""Objectives of on-policy distillation: pure functions, the same for the exact study and the LLM.

A method is three choices. The **credit** spreads the tokens' costs over the tokens that caused them
(once per optimizer step, over the whole batch, no gradient; `opd.objectives.credit`); the **surrogate** turns
it into a loss whose gradient is the estimate (token by token, with gradient; `opd.objectives.surrogates`); the
**reduction** divides by an explicit denominator (`opd.objectives.reduction`). Named compositions stand in
`OBJECTIVES` (`opd.objectives.catalogue`), reductions in `DENOMINATORS`. This module is the door to all of
them; `make` builds what may be trained with and refuses the rest.
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
    ERRORS,
    FORMS,
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
    outcome_cost,
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
    "ERRORS",
    "FORMS",
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
    "make",
    "mean_future",
    "reduce",
    "sampled_token",
    "sampled_token_clipped",
    "sampled_token_weighted",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
]


def make(
    name: str,
    gamma: float = 0.0,
    baseline: str = "none",
    ratio: str = "none",
    *,
    beta: float | None = None,
    clip: tuple[float, float, float] | None = None,
    ratio_clip: float = math.inf,
    reward_weight: float = 0.0,
    reward_baseline: str = "leave_one_out",
    mask_scope: str = "cost",
    allow_collapse: bool = False,
) -> Objective:
    """The objective called `name`; refuses what it would silently ignore, and known errors.

    Args:
      name: in OBJECTIVES. gamma: discount of later costs. baseline, ratio: in `opd.objectives.credit`.
      beta: of full_jsd, 0.5 if None. clip: (low, high, dual) of sampled_token_clipped, its own
        if None.
      ratio_clip: nats within which the sampled tokens' costs are held (`clipped_cost`), and the
        log-ratios of a reverse KL on a support or on the whole vocabulary.
      reward_weight: weight of the reward, reward_weight * E[reward] taken from what is minimised. Any objective
        takes one: its own score function carries it, or a plain one where it has none, with an
        `reward_baseline` of `opd.objectives.credit.ADVANTAGES`.
      mask_scope: in `opd.objectives.credit.MASK_SCOPES`; without a mask, and at gamma = 0, all the same.
      allow_collapse: a form in COLLAPSING is wanted all the same, to study it.

    Raises:
      ValueError: an unknown name, a number outside its range, a choice that would have no effect or
        only add noise, a known error, or a form that collapses.
    """
    _check_names(name, baseline, ratio, reward_baseline, mask_scope)
    _check_collapse(name, allow_collapse)
    check_gamma(gamma)
    made = _construct(name, gamma, beta, clip)
    if baseline != "none":
        made = _centred(name, made, baseline)
    if ratio_clip != math.inf:
        made = _limited(name, made, ratio_clip)
    if reward_weight:
        made = _mixed(name, made, reward_weight, reward_baseline)
    elif reward_baseline != "leave_one_out":
        raise InvalidInput(
            f"reward_baseline {reward_baseline!r} has no effect without a reward_weight"
        )
    if ratio == "token" and not made.sampled:
        raise InvalidInput(
            f"{name} does not read the sampled token, so that its own ratio only adds noise; "
            "ratio 'sequence' reweights the prefixes"
        )
    if mask_scope == "loss" and not _counts_masked_costs(made, baseline):
        raise InvalidInput(
            f"{name} at gamma = {made.gamma} with baseline {baseline!r} gives no token the cost of "
            "another; mask_scope 'loss' would have no effect, use 'cost'"
        )
    return replace(made, ratio=RATIOS[ratio], mask_scope=mask_scope)


def _counts_masked_costs(made: Objective, baseline: str) -> bool:
    """Whether a supervised token's credit may hold the cost of a token that is not."""
    over_responses = baseline not in ("none", "local_kl", "given")
    return made.gamma > 0 or (over_responses and made.sampled_own)


def _check_names(
    name: str, baseline: str, ratio: str, reward_baseline: str, mask_scope: str
) -> None:
    if name in ERRORS:
        raise InvalidInput(f"{name} is a known error: {ERRORS[name][1]}; use sampled_token")
    for kind, chosen, known in (
        ("objective", name, OBJECTIVES),
        ("baseline", baseline, BASELINES),
        ("ratio", ratio, RATIOS),
        ("reward_baseline", reward_baseline, ADVANTAGES),
        ("mask scope", mask_scope, MASK_SCOPES),
    ):
        if chosen not in known:
            raise InvalidInput(f"unknown {kind} {chosen!r}; known: {', '.join(known)}")


def _check_collapse(name: str, accepted: bool) -> None:
    for ending, why in COLLAPSING.items():
        if name.endswith(ending) and not accepted:
            stem = name.removesuffix(ending)
            raise InvalidInput(
                f"{name} collapses: {why}; use {stem}, {stem}_bucket or the unbiased "
                f"{stem}_sampled_tail, or pass allow_collapse=True"
            )


def _construct(
    name: str, gamma: float, beta: float | None, clip: tuple[float, float, float] | None
) -> Objective:
    """The constructor with the choices that were made, all of which it must know."""
    constructor = OBJECTIVES[name]
    parameters = inspect.signature(constructor).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {"gamma", "beta", "clip"} if takes_any else set(parameters)
    choices = {"gamma": gamma or None, "beta": beta, "clip": clip}
    made = {word: value for word, value in choices.items() if value is not None}
    for word, value in made.items():
        if word == "gamma" and word not in known:
            raise InvalidInput(
                f"{name} is local, gamma = {value} would have no effect; use gamma = 0"
            )
        if word not in known:
            raise InvalidInput(f"{word} = {value} would have no effect on {name}")
    return constructor(**made)


def _centred(name: str, made: Objective, baseline: str) -> Objective:
    """The objective with the baseline, if there is a credit that it could centre."""
    if not made.scores_credit:
        raise InvalidInput(
            f"{name} at gamma = {made.gamma} has no credit from which to subtract the baseline "
            f"{baseline!r}"
        )
    if baseline == "local_kl" and not made.sampled_own:
        raise InvalidInput(
            f"{name} has the token's own cost in closed form, not in its credit; the baseline "
            "'local_kl' is the mean of that cost and would only add noise"
        )
    distributions = made.distributions or baseline == "local_kl"
    return replace(made, baseline=BASELINES[baseline], distributions=distributions)


def _limited(name: str, made: Objective, limit: float) -> Objective:
    """The objective with its sampled costs, and the log-ratios of its local part, clipped."""
    if not limit > 0:
        raise InvalidInput(f"ratio_clip is {limit}; it must be a positive number of nats")
    later = made.sampled_later and made.gamma > 0
    if not (made.sampled_own or later or made.takes_limit):
        raise InvalidInput(
            f"{name} at gamma = {made.gamma} has no sampled cost in its credit and no log-ratio "
            f"that can be clipped; ratio_clip = {limit} would have no effect"
        )
    cost = partial(clipped_cost, limit=limit)
    surrogate: Callable[..., Tensor] = made.local
    return replace(
        made,
        local=partial(surrogate, limit=limit) if made.takes_limit else surrogate,
        own=cost if made.sampled_own else made.own,
        later=cost if made.sampled_later else made.later,
    )


def _mixed(name: str, made: Objective, weight: float, reward_baseline: str) -> Objective:
    """The objective with an outcome reward in its credit, and a score that carries it."""
    if not (math.isfinite(weight) and weight > 0):
        raise InvalidInput(f"reward_weight is {weight}; the weight of the reward must be positive")
    return replace(
        made,
        outcome=partial(outcome_cost, weight=weight, advantage=ADVANTAGES[reward_baseline]),
        score=made.score if made.scores_credit else plain_score,
        scores_credit=True,
        sampled=True,
        importance_weighted=made.importance_weighted,
        normalised=True,
    )
