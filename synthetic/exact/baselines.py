"""Exact baselines, and the exact variance of a leave-one-out group.

Scores are martingale differences: E[score | prefix] = 0 and E<score_t, score_u> = 0 for t != u.
Hence the variance of an estimator minus sum_t b_t(c) score_t equals that of the estimator minus
2 sum_t E[b_t <score_t, g>] plus sum_t E[b_t^2 |score_t|^2]. This is separable in the values of b,
so the best baseline has a closed form.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.estimators import Terms
from synthetic.exact.parameters import SharedParameters, TableParameters
from synthetic.exact.returns import convolve, convolve_tokens, return_measures

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
    shape = (len(terms.gammas), *terms.occupancy.shape)
    if name == "none":
        return terms.values.new_zeros(shape)
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
    norms = space.inner_products(terms.score, terms.score)
    own_step = space.inner_products(terms.score, terms.step)
    earlier, later = (
        _table_projections(terms)
        if isinstance(space, TableParameters)
        else _shared_projections(terms, space)
    )
    projections = terms.occupancy * later
    for t, visits in enumerate(terms.occupancy):
        future = _future(terms, t)
        per_action = visits[:, None] * (own_step + norms * future)
        per_action += (terms.later + future) * terms.gammas[:, None, None] * earlier[:, t]
        projections[:, t] += (terms.acting * per_action).sum(-1)
    return projections, terms.occupancy * (terms.acting * norms).sum(-1)


def _future(terms: Terms, step: int, states: slice = slice(None)) -> Tensor:
    """Return (G, C, A) mean discounted later cost after each token of a step."""
    values = terms.transitions.expected(terms.values[:, step + 1], states)
    return terms.gammas[:, None, None] * values


def _mean_steps(terms: Terms, steps: slice, states: slice) -> Tensor:
    """Return (G, T, C, A) mean gradient of a step given the state, over the state's logits."""
    following = slice(steps.start + 1, steps.stop + 1)
    values = terms.transitions.expected(terms.values[:, following], states)
    acting, score = terms.acting[states], terms.score[states]
    fixed = torch.einsum("ca,cak->ck", acting, terms.step[states])
    weight = acting * terms.gammas[:, None, None, None] * values
    return fixed + torch.einsum("gtca,cak->gtck", weight, score)


def _table_projections(terms: Terms) -> tuple[Tensor, Tensor]:
    """Return the products of scores with earlier scores and with later steps, for a table.

    Args:
        terms: Per-token terms of the estimator.

    Returns:
        (G, T, S, A) products of each token's score with the discounted earlier scores, joint with
        the state; and (G, T, S) mean products with the later steps, given the state.
    """
    (s, a), g, horizon = terms.acting.shape, len(terms.gammas), len(terms.occupancy)
    earlier = terms.values.new_zeros(g, horizon, s, a)
    later = terms.values.new_zeros(g, horizon, s)
    if horizon == 1:
        return earlier, later
    no_costs = torch.zeros(0, dtype=torch.long)
    ages = terms.gammas[:, None] ** torch.arange(horizon - 1, dtype=terms.gammas.dtype)
    size = max(1, min(128, 2**21 // (g * horizon * a)))
    for begin in range(0, s, size):
        states = slice(begin, min(begin + size, s))
        score = terms.score[states]
        measure = terms.acting * terms.active[:, None]
        returns = return_measures(
            terms.transitions, horizon, measure, measure[None], no_costs, terms.gammas[:0], states
        )[:, 0]
        kernels = (ages[:, :, None, None] * returns).permute(2, 1, 0, 3)  # (C, K, G, A)
        visits = terms.occupancy[:-1, states].T.contiguous()
        scores = convolve(visits, kernels.flatten(2)).view(kernels.shape).permute(2, 1, 0, 3)
        gram = score @ score.mT
        earlier[:, 1:, states] = torch.einsum("gtcy,cya->gtca", scores, gram)
        gradients = _mean_steps(terms, slice(1, horizon), states)
        along = torch.einsum("gtck,cak->gtca", gradients, score)
        later[:, :-1, states] = convolve_tokens(returns, along.flip(1)).sum(-1).flip(1)
    return earlier, later


def _shared_projections(terms: Terms, space: SharedParameters) -> tuple[Tensor, Tensor]:
    """Return the same as `_table_projections`, for shared parameters.

    Args:
        terms: Per-token terms of the estimator.
        space: Space of the parameters.

    Returns:
        (G, T, S, A) and (G, T, S).
    """
    (s, a), g, horizon = terms.acting.shape, len(terms.gammas), len(terms.occupancy)
    earlier = terms.values.new_zeros(g, horizon, s, a)
    later = terms.values.new_zeros(g, horizon, s)
    score = (terms.score @ space.jacobian).permute(2, 0, 1)  # (D, S, A)
    # gradients: the mean contribution of the steps after t to a trajectory's gradient
    gradients = terms.values.new_zeros(g, *space.shape, s)
    for t in reversed(range(horizon)):
        moved = terms.transitions.expected(gradients)
        later[:, t] = torch.einsum("ca,dca,gdca->gc", terms.acting, score, moved)
        step = _mean_steps(terms, slice(t, t + 1), slice(0, s))[:, 0]
        gradients = terms.moves.pull(gradients)
        gradients = gradients + torch.einsum("gca,cad->gdc", step, space.jacobian)
    for t, scores in enumerate(_earlier_scores(terms, score)):
        earlier[:, t] = torch.einsum("gdc,dca->gca", scores, score)
    return earlier, later


def _earlier_scores(terms: Terms, score: Tensor) -> Iterator[Tensor]:
    """Yield (G, D, S) discounted earlier scores before each step, joint with the state."""
    scores = terms.values.new_zeros(len(terms.gammas), len(score), len(terms.active))
    for visits in terms.occupancy:
        yield scores
        discounted = terms.gammas[:, None, None] * terms.moves.push(scores)
        scores = discounted + terms.transitions.push(terms.acting * visits[:, None] * score)


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
    projections, norms = (x.sum(-1) for x in score_projections(terms, space))  # (G, T), (T,)
    n = terms.occupancy
    mean_credit = (n * terms.value).sum(-1)  # (G, T)
    square_credit = (n * _mean_square_credit(terms)).sum(-1)
    cross = _credit_products(terms, space)
    num_others = group - 1
    return (
        variance
        - 2 * (mean_credit * projections).sum(-1)
        + (group - 2) / num_others * (mean_credit.square() * norms).sum(-1)
        + ((square_credit * norms).sum(-1) + cross) / num_others
    )


def _credit_products(terms: Terms, space: TableParameters | SharedParameters) -> Tensor:
    """Return (G,) sum over steps t and u of <E[score_t C_u], E[score_u C_t]>.

    For u < t, past costs drop from C_u, and E[score_t C_u] is gamma^(t-u) E[score_t L_t].
    """
    cross = terms.values.new_zeros(len(terms.gammas))
    later_scores = []
    for t, visits in enumerate(terms.occupancy):
        future, weight = _future(terms, t), visits[:, None] * terms.acting
        credit_score, later_score = (
            torch.einsum("gca,cak->gck", weight * (cost + future), terms.score)
            for cost in (terms.own, terms.later)
        )
        cross += space.to_gradient(credit_score).flatten(1).square().sum(1)
        later_scores.append(later_score)
    if isinstance(space, SharedParameters):
        score = (terms.score @ space.jacobian).permute(2, 0, 1)
        for t, scores in enumerate(_earlier_scores(terms, score)):
            past = torch.einsum("gc,gdc->gd", terms.value[:, t], scores)
            cross += 2 * terms.gammas * (space.to_gradient(later_scores[t]) * past).sum(-1)
        return cross
    return cross + 2 * _table_credit_products(terms, torch.stack(later_scores, 1))


def _table_credit_products(terms: Terms, later_scores: Tensor) -> Tensor:
    """Return (G,) sum over u < t of the products in `_credit_products`, for a table.

    The value of the credit at t is pulled back to all u < t, so that time grows as T^2.

    Args:
        terms: Per-token terms of the estimator.
        later_scores: (G, T, S, A) E[score_t L_t], joint with the state.

    Returns:
        (G,) products.
    """
    (s, a), (g, horizon) = terms.acting.shape, later_scores.shape[:2]
    cross = terms.values.new_zeros(g)
    value, size = terms.value, max(1, 2**22 // (g * s * a))
    for begin in range(1, horizon, size):
        steps = torch.arange(begin, min(begin + size, horizon))
        weights = terms.acting * torch.einsum("gtck,cak->gtca", later_scores[:, steps], terms.score)
        pulled = value[:, steps]
        for lag in range(1, int(steps[-1]) + 1):
            kept = slice(int((steps < lag).sum()), None)
            steps, weights, pulled = steps[kept], weights[:, kept], pulled[:, kept]
            products = (weights * terms.transitions.expected(pulled)).sum(-1)
            visits = terms.occupancy[steps - lag]
            cross += terms.gammas**lag * (products * visits).sum((-1, -2))
            pulled = terms.moves.pull(pulled)
    return cross


def _mean_square_credit(terms: Terms) -> Tensor:
    """Return (G, T, S) E[C_t^2 | state], by the recursion of the later costs' second moment."""
    gammas = terms.gammas[:, None, None]
    later_square = torch.zeros_like(terms.values[:, 0])
    credit_squares = []
    for t in reversed(range(len(terms.occupancy))):
        future = _future(terms, t)
        future_square = gammas**2 * terms.transitions.expected(later_square)
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
