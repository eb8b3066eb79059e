"""Exact baselines, and the exact variance of a leave-one-out group.

Scores are martingale differences: E[score | prefix] = 0 and E<score_t, score_u> = 0 for t != u. So
the variance of an estimator minus sum_t b_t(c) score_t is that of the estimator minus
2 sum_t E[b_t <score_t, g>] plus sum_t E[b_t^2 |score_t|^2]: separable in the values of b, which is
why the best baseline has a closed form.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.estimators import Terms
from synthetic.exact.recursion import Shared, Table, carry, products

_TINY = torch.finfo(torch.float64).tiny


def table(name: str, at: Terms, space: Table | Shared) -> Tensor:
    """(G, T, S) the baseline called `name`: none, value, position_value, local_kl or optimal.

    "position_value" is the exact mean credit at a step of the trajectories alive there, to which
    the sampled `position_mean` tends as prompts are added.
    """
    shape = at.value.shape
    if name == "none":
        return torch.zeros(shape, dtype=at.value.dtype)
    if name == "value":
        return at.value
    if name == "local_kl":
        return at.local.expand(shape)
    if name == "position_value":
        alive = at.occupancy * at.active
        share = alive / alive.sum(-1, keepdim=True).clamp(min=_TINY)
        return (share * at.value).sum(-1, keepdim=True).expand(shape)
    if name == "optimal":
        along, norms = projections(at, space)
        return along / norms.clamp(min=_TINY)
    raise InvalidInput(f"unknown baseline {name!r}")


def projections(at: Terms, space: Table | Shared) -> tuple[Tensor, Tensor]:
    """E[<score_t, g>; c] (G, T, S) of the estimator g without baseline, and E[|score_t|^2; c].

    <score_t, g> has four parts: the own step; the own and later costs times the earlier scores;
    the later costs times the own score; and what is still to come, which the token steers.
    (T, S) of the second: norms. Both are joint with being at state c at step t.
    """
    _on_policy(at)
    s, g, horizon = len(at.active), len(at.gammas), len(at.occupancy)
    joint = at.acting[..., None] * at.transition
    column, wide = at.gammas[:, None, None], at.gammas.view(-1, 1, *(1,) * len(space.shape))
    ss, sv = space.inner(at.score, at.score), space.inner(at.score, at.step)
    score_step = torch.einsum("cad,cak->ckd", joint, at.score)
    future = at.gammas[:, None, None, None] * at.next_values  # (G, T, S, A) gamma F_{t+1}

    # rest: what a trajectory's gradient still gains on average from step t on
    rest = torch.zeros(g, s, *space.shape, dtype=joint.dtype)
    ahead = torch.zeros(g, horizon, s, dtype=joint.dtype)
    identity = torch.eye(s, dtype=joint.dtype)
    for t in reversed(range(horizon)):
        ahead[:, t] = torch.einsum("cax,gxca->gc", score_step, space.every(rest))
        weight = at.acting * future[:, t]
        here = torch.einsum("ca,cak->ck", at.acting, at.step)
        here = here + torch.einsum("gca,cak->gck", weight, at.score)
        rest = carry(rest, at.move.T) + space.place(here[..., None] * identity[:, None])
    along = torch.zeros_like(ahead)
    z = torch.zeros(g, s, *space.shape, dtype=joint.dtype)
    for t in range(horizon):
        n = at.occupancy[t]
        earlier = products(space.own(z), at.score)
        parts = n[:, None] * (sv + ss * future[:, t]) + column * (at.later + future[:, t]) * earlier
        along[:, t] = (at.acting * parts).sum(-1) + n * ahead[:, t]
        placed = (score_step * n[:, None, None]).expand(g, -1, -1, -1)
        z = wide * carry(z, at.move) + space.place(placed)
    return along, at.occupancy * (at.acting * ss).sum(-1)


def leave_one_out_variance(
    at: Terms, space: Table | Shared, variance: Tensor, group: int
) -> Tensor:
    """(G,) `group` times the variance of the group's mean gradient with the leave-one-out baseline.

    Rollouts are independent draws of the world; an ended one counts with credit 0. With A the
    estimator without baseline, C_t its credits and L_t the discounted later costs from t on, the
    sum over pairs of rollouts leaves
      Var A - 2 sum_t E[C_t] E<score_t, A> + (n-2)/(n-1) sum_t E[C_t]^2 E|score_t|^2
      + 1/(n-1) (sum_t E[C_t^2] E|score_t|^2 + sum_{t,u} <E[score_t C_u], E[score_u C_t]>).

    Args:
      variance: (G,) of A.
    """
    _on_policy(at)
    if group < 2:
        raise InvalidInput(
            f"group is {group}; the leave-one-out baseline needs at least 2 rollouts"
        )
    s, g, horizon = len(at.active), len(at.gammas), len(at.occupancy)
    along, norms = (x.sum(-1) for x in projections(at, space))  # (G, T), (T,)
    n = at.occupancy
    mean = (n * at.value).sum(-1)  # (G, T)
    square = (n * _mean_square_credit(at)).sum(-1)

    wide = at.gammas.view(-1, 1, *(1,) * len(space.shape))
    joint = at.acting[..., None] * at.transition
    score_step = torch.einsum("cad,cak->ckd", joint, at.score)
    z = torch.zeros(g, s, *space.shape, dtype=joint.dtype)
    cross = torch.zeros(g, dtype=joint.dtype)
    for t in range(horizon):
        future = at.gammas[:, None, None] * at.next_values[:, t]
        own, whole = (
            space.place(
                torch.einsum("gca,cak->gck", n[t, :, None] * at.acting * (cost + future), at.score)[
                    ..., None
                ]
            )[:, 0]
            for cost in (at.own, at.later)
        )  # E[score_t C_t], E[score_t L_t]
        before = torch.einsum("gc,gc...->g...", at.value[:, t], wide * z)  # sum_u<t E[score_u C_t]
        cross += (own.square() + 2 * whole * before).flatten(1).sum(1)
        placed = (score_step * n[t, :, None, None]).expand(g, -1, -1, -1)
        z = wide * carry(z, at.move) + space.place(placed)
    others = group - 1
    return (
        variance
        - 2 * (mean * along).sum(-1)
        + (group - 2) / others * (mean.square() * norms).sum(-1)
        + ((square * norms).sum(-1) + cross) / others
    )


def _mean_square_credit(at: Terms) -> Tensor:
    """(G, T, S) E[C_t^2 | state], by the recursion of the later costs' second moment."""
    gammas = at.gammas[:, None, None]
    square = torch.zeros_like(at.values[:, 0])
    rows = []
    for t in reversed(range(len(at.occupancy))):
        future = gammas * at.next_values[:, t]
        spread = gammas**2 * torch.einsum("cad,gd->gca", at.transition, square)
        mean_of = [
            (at.acting * (cost.square() + 2 * cost * future + spread)).sum(-1)
            for cost in (at.own, at.later)
        ]
        rows.append(mean_of[0])
        square = mean_of[1]
    return torch.stack(rows[::-1], 1)


def _on_policy(at: Terms) -> None:
    if not at.on_policy:
        raise InvalidInput("optimal and leave-one-out baselines need the student as the sampler")
