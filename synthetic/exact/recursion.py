"""The moment recursion: mean and mean square of a sum along a Markov chain, without sampling.

With Z = sum_t gamma^(age) score_t the discounted scores so far and G the estimate so far, a step
at state c with token y is G <- G + gamma later Z + step - b score, Z <- gamma Z + score. Given the
state reached, the first and second moments of (Z, G) obey linear recursions.

A score is a vector over the logits of its own state. With a table of logits it touches block c of
the gradient only, which turns a step of the recursion into three (S, S) x (S, S*A) products; with
shared parameters, a Jacobian carries it into their space.

Shapes: S states, A actions, T steps, G discounts, D parameters. Everything is float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthetic.estimators import Terms
from synthetic.worlds.mdp import TabularMDP


@dataclass(frozen=True, eq=False)
class Table:
    """The parameters are the logits themselves: a gradient is (S, A)."""

    num_states: int
    num_actions: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_states, self.num_actions

    def own(self, vectors: Tensor) -> Tensor:
        """(G, S, *shape), one gradient a state -> (G, S, A): its product with that state's logits.

        The product with a logit is the inner product with the logit's gradient.
        """
        return vectors.diagonal(dim1=1, dim2=2).mT

    def every(self, vectors: Tensor) -> Tensor:
        """(G, X, *shape) -> (G, X, S, A): the product with the logits of every state."""
        return vectors

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """(..., S, A, A) twice -> (..., S, A): products of vectors over one state's logits."""
        return (left * right).sum(-1)

    def place(self, vectors: Tensor) -> Tensor:
        """(G, S, A, X) vectors over each state's logits -> (G, X, *shape), summed over states."""
        return vectors.permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Shared:
    """The logits are functions of D parameters: jacobian (S, A, D), a gradient is (D,)."""

    jacobian: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.jacobian.shape[-1],)

    def own(self, vectors: Tensor) -> Tensor:
        return torch.einsum("gcd,cad->gca", vectors, self.jacobian)

    def every(self, vectors: Tensor) -> Tensor:
        return torch.einsum("gxd,cad->gxca", vectors, self.jacobian)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return (left @ self.jacobian * (right @ self.jacobian)).sum(-1)

    def place(self, vectors: Tensor) -> Tensor:
        return torch.einsum("gcax,cad->gxd", vectors, self.jacobian)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Estimators and discounts to propagate at once, R of them.

    gammas (R,); later (R, S, A); step, score (R, S, A, A); baseline (R, T, S).
    """

    gammas: Tensor
    later: Tensor
    step: Tensor
    score: Tensor
    baseline: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[Terms, Tensor]]) -> "Rows":
        """One row for every discount of every pair of terms and baseline (G, T, S)."""

        def stack(name: str) -> Tensor:
            shapes = [getattr(at, name) for at, _ in parts]
            return torch.cat([x.expand(len(parts[0][0].gammas), *x.shape) for x in shapes])

        return cls(
            gammas=torch.cat([at.gammas for at, _ in parts]),
            later=stack("later"),
            step=stack("step"),
            score=stack("score"),
            baseline=torch.cat([baseline for _, baseline in parts]),
        )


def propagate(
    mdp: TabularMDP, measure: Tensor, rows: Rows, by_length: Tensor, space: Table | Shared
) -> tuple[Tensor, Tensor]:
    """(R, *shape) mean and (R,) mean squared norm after the last step, under a measure.

    First moments do not depend on second ones, so they run first; what they feed into the second
    moments is then computed for all steps at once.

    Args:
      measure: (S, A), of a token given the state; need not sum to 1 (an importance weight).
      by_length: (T + 1,) factor of a trajectory that emitted so many tokens.
    """
    # what reaches the end is weighed by its length on arrival, and goes no further
    leave = mdp.active
    joint = (measure * leave[:, None])[..., None] * mdp.transition
    here = [mdp.start]
    for _ in range(mdp.horizon - 1):
        here.append(here[-1] @ joint.sum(1))
    visits = torch.stack(here)
    total, own = _first_moments(rows, joint, visits, by_length, leave, space)
    return total, _second_moments(rows, joint, visits, by_length, leave, space, own)


def _first_moments(
    rows: Rows,
    joint: Tensor,
    visits: Tensor,
    by_length: Tensor,
    leave: Tensor,
    space: Table | Shared,
) -> tuple[Tensor, Tensor]:
    """(R, *shape) E[G by_length], and (T, 2, R, S, A) of E[Z; c], E[G; c] before each step.

    The latter as products with the logits of state c, which is all that a step at c needs.

    Args:
      joint: (S, A, S) measure of token and next state; visits (T, S); leave (S,) 0 at the end.
    """
    r, s, a = rows.later.shape
    horizon, size, gammas = len(visits), math.prod(space.shape), rows.gammas[:, None, None]
    move = joint.sum(1)
    # (Z, G) at state c -> (Z, G) at state d
    step = joint.new_zeros(r, 2, s, 2, s)
    step[:, 0, :, 0] = (gammas * move).mT
    step[:, 1, :, 0] = (gammas * torch.einsum("rca,cad->rcd", rows.later, joint)).mT
    step[:, 1, :, 1] = move.mT
    step = step.reshape(r, 2 * s, 2 * s)
    score_step = torch.einsum("cad,rcak->rckd", joint, rows.score)  # E[score 1(next)]
    fixed_step = torch.einsum("cad,rcak->rckd", joint, rows.step)
    plain = not bool(rows.baseline.any())

    both = joint.new_zeros(r, 2 * s, size)  # E[Z 1(state)], E[G 1(state)]
    own = joint.new_empty(horizon, 2, r, s, a)
    mean = joint.new_zeros(r, size)
    for t in range(horizon):
        for half, vectors in enumerate(both.view(r, 2, s, *space.shape).unbind(1)):
            own[t, half] = space.own(vectors)
        both = step @ both
        n = visits[t, :, None, None]
        scored, late = score_step * n, fixed_step * n
        if not plain:
            late = late - rows.baseline[:, t, :, None, None] * scored
        both[:, :s] += space.place(scored).reshape(r, s, size)
        both[:, s:] += space.place(late).reshape(r, s, size)
        mean += by_length[t + 1] * ((1 - leave) @ both[:, s:])
    mean += by_length[horizon] * (leave @ both[:, s:])
    return mean.view(r, *space.shape), own


def _second_moments(
    rows: Rows,
    joint: Tensor,
    visits: Tensor,
    by_length: Tensor,
    leave: Tensor,
    space: Table | Shared,
    own: Tensor,
) -> Tensor:
    """(R,) E[|G|^2 by_length^2], from E|Z|^2, E<G, Z> and E|G|^2 at each state.

    own: (T, 2, R, S, A) as `_first_moments` returns it.
    """
    (r, s, a), horizon, gammas = rows.later.shape, len(visits), rows.gammas[:, None, None]
    ss, sv = space.inner(rows.score, rows.score), space.inner(rows.score, rows.step)
    vv, fz = space.inner(rows.step, rows.step), rows.later * gammas
    b, n = rows.baseline.transpose(0, 1)[..., None], visits[:, None, :, None]  # (T, R, S, 1)
    along = torch.einsum("thrca,rcya->thrcy", own, torch.cat([rows.score, rows.step], 2))
    (z_s, z_v), (g_s, g_v) = (x.split(a, -1) for x in along.unbind(1))
    z_v, g_v = z_v - b * z_s, g_v - b * g_s
    fed_zz = 2 * gammas * z_s + n * ss
    fed_gz = g_s + fz * z_s + gammas * z_v + n * (sv - b * ss)
    fed_gg = n * (vv - 2 * b * sv + b.square() * ss) + 2 * (g_v + fz * z_v)
    flat = joint.reshape(s * a, s)
    fed = torch.cat([x.reshape(horizon, r, -1) @ flat for x in (fed_zz, fed_gz, fed_gg)], -1)

    move, pay, pay2 = (
        torch.einsum("rca,cad->rcd", x, joint)
        for x in (torch.ones_like(rows.later), rows.later, rows.later.square())
    )
    step = joint.new_zeros(r, 3, s, 3, s)
    step[:, 0, :, 0] = gammas**2 * move
    step[:, 0, :, 1] = gammas**2 * pay
    step[:, 0, :, 2] = gammas**2 * pay2
    step[:, 1, :, 1] = gammas * move
    step[:, 1, :, 2] = 2 * gammas * pay
    step[:, 2, :, 2] = move
    step = step.reshape(r, 3 * s, 3 * s)
    three = joint.new_zeros(r, 1, 3 * s)
    arrived = joint.new_empty(horizon, r, s)
    for t in range(horizon):
        three = torch.baddbmm(fed[t, :, None], three, step)
        arrived[t] = three[:, 0, 2 * s :]
    weight = by_length[1:].square()
    return torch.einsum("t,trs,s->r", weight, arrived, 1 - leave) + weight[-1] * (
        arrived[-1] @ leave
    )


def products(own: Tensor, vectors: Tensor) -> Tensor:
    """(G, S, A) x (S, Y, A) -> (G, S, Y)."""
    return torch.einsum("gca,cya->gcy", own, vectors)


def carry(vectors: Tensor, move: Tensor) -> Tensor:
    """sum_c move[c, d] vectors[:, c]: (G, S, ...), (S, S) -> (G, S, ...)."""
    g, s = vectors.shape[:2]
    return (move.T @ vectors.reshape(g, s, -1)).reshape(vectors.shape)
