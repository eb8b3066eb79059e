"""Exact baselines, and the exact variance of a leave-one-out group.

Scores are martingale differences: E[score | prefix] = 0 and E<score_t, score_u> = 0 for t != u.
Hence the variance of an estimator minus sum_t b_t(c) score_t equals that of the estimator minus
2 sum_t E[b_t <score_t, g>] plus sum_t E[b_t^2 |score_t|^2]. This is separable in the values of b,
so the best baseline has a closed form.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.estimators import Terms
from synthetic.exact.recursion import (
    SharedParameters,
    TableParameters,
    apply_transition,
    logit_products,
)

_TINY = torch.finfo(torch.float64).tiny


def baseline_table(name: str, terms: Terms, space: TableParameters | SharedParameters) -> Tensor:
    """Return the baseline called `name` for every discount, step and state.

    Args:
        name: "none", "value", "position_value", "local_kl" or "optimal". "position_value" is the
            exact mean credit at a step over the trajectories that are still running; the sampled
            `position_mean` converges to it as prompts are added.
        terms: Per-token terms of the estimator.
        space: Space of the parameters, which "optimal" depends on.

    Returns:
        (G, T, S) baseline.

    Raises:
        InvalidInput: If the name is unknown.
    """
    shape = terms.value.shape
    if name == "none":
        return torch.zeros(shape, dtype=terms.value.dtype)
    if name == "value":
        return terms.value
    if name == "local_kl":
        return terms.local.expand(shape)
    if name == "position_value":
        visits = terms.occupancy * terms.active
        share = visits / visits.sum(-1, keepdim=True).clamp(min=_TINY)
        return (share * terms.value).sum(-1, keepdim=True).expand(shape)
    if name == "optimal":
        projections, norms = score_projections(terms, space)
        return projections / norms.clamp(min=_TINY)
    raise InvalidInput(
        f"unknown baseline {name!r}; known: none, value, position_value, local_kl, optimal"
    )


def score_projections(
    terms: Terms, space: TableParameters | SharedParameters
) -> tuple[Tensor, Tensor]:
    """Compute the exact projections of the estimator on each score, and the norms of the scores.

    <score_t, g> has four parts: the token's own step; its own and later costs times the earlier
    scores; the later costs times its own score; and the later part of the gradient, whose
    distribution depends on the token.

    Args:
        terms: Per-token terms of the estimator; the student must be the sampler.
        space: Space of the parameters.

    Returns:
        (G, T, S) E[<score_t, g>; c] of the estimator g without baseline, and (T, S)
        E[|score_t|^2; c]. Both are joint with the event of being at state c at step t.
    """
    _check_on_policy(terms)
    s, g, horizon = len(terms.active), len(terms.gammas), len(terms.occupancy)
    joint = terms.acting[..., None] * terms.transition
    gamma_column, gamma_broadcast = (
        terms.gammas[:, None, None],
        terms.gammas.view(-1, 1, *(1,) * len(space.shape)),
    )
    ss, sv = (
        space.inner_products(terms.score, terms.score),
        space.inner_products(terms.score, terms.step),
    )
    score_step = torch.einsum("cad,cak->ckd", joint, terms.score)
    future = terms.gammas[:, None, None, None] * terms.next_values  # (G, T, S, A) gamma F_{t+1}

    # future_gradient: the mean contribution of the steps from t on to a trajectory's gradient
    future_gradient = torch.zeros(g, s, *space.shape, dtype=joint.dtype)
    future_projection = torch.zeros(g, horizon, s, dtype=joint.dtype)
    identity = torch.eye(s, dtype=joint.dtype)
    for t in reversed(range(horizon)):
        future_projection[:, t] = torch.einsum(
            "cax,gxca->gc", score_step, space.all_products(future_gradient)
        )
        weight = terms.acting * future[:, t]
        step_gain = torch.einsum("ca,cak->ck", terms.acting, terms.step)
        step_gain = step_gain + torch.einsum("gca,cak->gck", weight, terms.score)
        future_gradient = apply_transition(future_gradient, terms.move.T) + space.to_gradients(
            step_gain[..., None] * identity[:, None]
        )
    projections = torch.zeros_like(future_projection)
    past_scores = torch.zeros(g, s, *space.shape, dtype=joint.dtype)
    for t in range(horizon):
        n = terms.occupancy[t]
        past_products = logit_products(space.state_products(past_scores), terms.score)
        per_action = (
            n[:, None] * (sv + ss * future[:, t])
            + gamma_column * (terms.later + future[:, t]) * past_products
        )
        projections[:, t] = (terms.acting * per_action).sum(-1) + n * future_projection[:, t]
        new_scores = (score_step * n[:, None, None]).expand(g, -1, -1, -1)
        past_scores = gamma_broadcast * apply_transition(
            past_scores, terms.move
        ) + space.to_gradients(new_scores)
    return projections, terms.occupancy * (terms.acting * ss).sum(-1)


def leave_one_out_variance(
    terms: Terms, space: TableParameters | SharedParameters, variance: Tensor, group: int
) -> Tensor:
    """Compute the exact variance of a group's mean gradient with the leave-one-out baseline.

    Rollouts are independent draws from the world; an ended one counts with credit 0. With A the
    estimator without baseline, C_t its credits and L_t the discounted later costs from t on, the
    sum over pairs of rollouts gives
      Var A - 2 sum_t E[C_t] E<score_t, A> + (n-2)/(n-1) sum_t E[C_t]^2 E|score_t|^2
      + 1/(n-1) (sum_t E[C_t^2] E|score_t|^2 + sum_{t,u} <E[score_t C_u], E[score_u C_t]>).

    Args:
        terms: Per-token terms of the estimator; the student must be the sampler.
        space: Space of the parameters.
        variance: (G,) variance of A.
        group: Number n of rollouts in a group, at least 2.

    Returns:
        (G,) `group` times the variance of the group's mean gradient.

    Raises:
        InvalidInput: If the group has fewer than 2 rollouts.
    """
    _check_on_policy(terms)
    if group < 2:
        raise InvalidInput(
            f"group is {group}; the leave-one-out baseline needs at least 2 rollouts per group"
        )
    s, g, horizon = len(terms.active), len(terms.gammas), len(terms.occupancy)
    projections, norms = (x.sum(-1) for x in score_projections(terms, space))  # (G, T), (T,)
    n = terms.occupancy
    mean_credit = (n * terms.value).sum(-1)  # (G, T)
    square_credit = (n * _mean_square_credit(terms)).sum(-1)

    gamma_broadcast = terms.gammas.view(-1, 1, *(1,) * len(space.shape))
    joint = terms.acting[..., None] * terms.transition
    score_step = torch.einsum("cad,cak->ckd", joint, terms.score)
    past_scores = torch.zeros(g, s, *space.shape, dtype=joint.dtype)
    cross = torch.zeros(g, dtype=joint.dtype)
    for t in range(horizon):
        future = terms.gammas[:, None, None] * terms.next_values[:, t]
        credit_score, later_score = (
            space.to_gradients(
                torch.einsum(
                    "gca,cak->gck", n[t, :, None] * terms.acting * (cost + future), terms.score
                )[..., None]
            )[:, 0]
            for cost in (terms.own, terms.later)
        )  # E[score_t C_t], E[score_t L_t]
        past_products = torch.einsum(
            "gc,gc...->g...", terms.value[:, t], gamma_broadcast * past_scores
        )  # sum_u<t E[score_u C_t]
        cross += (credit_score.square() + 2 * later_score * past_products).flatten(1).sum(1)
        new_scores = (score_step * n[t, :, None, None]).expand(g, -1, -1, -1)
        past_scores = gamma_broadcast * apply_transition(
            past_scores, terms.move
        ) + space.to_gradients(new_scores)
    num_others = group - 1
    return (
        variance
        - 2 * (mean_credit * projections).sum(-1)
        + (group - 2) / num_others * (mean_credit.square() * norms).sum(-1)
        + ((square_credit * norms).sum(-1) + cross) / num_others
    )


def _mean_square_credit(terms: Terms) -> Tensor:
    """Return (G, T, S) E[C_t^2 | state], by the recursion of the later costs' second moment."""
    gammas = terms.gammas[:, None, None]
    later_square = torch.zeros_like(terms.values[:, 0])
    credit_squares = []
    for t in reversed(range(len(terms.occupancy))):
        future = gammas * terms.next_values[:, t]
        future_square = gammas**2 * torch.einsum("cad,gd->gca", terms.transition, later_square)
        means = [
            (terms.acting * (cost.square() + 2 * cost * future + future_square)).sum(-1)
            for cost in (terms.own, terms.later)
        ]
        credit_squares.append(means[0])
        later_square = means[1]
    return torch.stack(credit_squares[::-1], 1)


def _check_on_policy(terms: Terms) -> None:
    if not terms.on_policy:
        raise InvalidInput(
            "optimal and leave-one-out baselines need the student as the sampler; remove `sampler`"
        )
