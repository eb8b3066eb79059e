"""The moment recursion: mean and mean square of a sum along a Markov chain, without sampling.

With Z = sum_t gamma^(age) score_t the discounted scores so far and G the estimate so far, a step
at state c with token y is G <- G + gamma later Z + step - b score, Z <- gamma Z + score. Given the
state reached, the first and second moments of (Z, G) obey linear recursions.

A score is a vector over the logits of its own state. With a table of logits it touches block c of
the gradient only, which turns a step of the recursion into three (S, S) x (S, S*A) products; with
shared parameters, a Jacobian carries it into their space.

Shapes: S states, A actions, T steps, G discounts, D parameters. Everything is float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from synthetic.estimators import Terms


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
        diagonal = torch.arange(self.num_states)
        return vectors[:, diagonal, diagonal]

    def every(self, vectors: Tensor) -> Tensor:
        """(G, X, *shape) -> (G, X, S, A): the product with the logits of every state."""
        return vectors

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """(S, A, A) x (S, A, A) -> (S, A): products of vectors over the logits of one state."""
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


def propagate(
    start: Tensor,
    horizon: int,
    end: int | None,
    at: Terms,
    measure: Tensor,
    baseline: Tensor,
    by_length: Tensor,
    space: Table | Shared,
) -> tuple[Tensor, Tensor]:
    """(G, *shape) mean and (G,) mean squared norm after the last step, under a measure.

    Args:
      measure: (S, A), of a token given the state; need not sum to 1 (an importance weight).
      baseline: (G, T, S); by_length: (T + 1,) factor of a trajectory that emitted so many tokens.
    """
    (s, a), g = at.acting.shape, len(at.gammas)
    joint = measure[..., None] * at.transition  # (S, A, S): token and next state given the state
    flat, move = joint.reshape(s * a, s), joint.sum(1)
    column, wide = at.gammas[:, None, None], at.gammas.view(-1, 1, *(1,) * len(space.shape))
    ss, sv = space.inner(at.score, at.score), space.inner(at.score, at.step)
    vv = space.inner(at.step, at.step)
    score_step = torch.einsum("cad,cak->ckd", joint, at.score)  # E[score 1(next)] over each state
    fixed_step = torch.einsum("cad,cak->ckd", joint, at.step)
    pay = torch.einsum("ca,cad->cd", at.later, joint)

    here = start
    z = torch.zeros(g, s, *space.shape, dtype=joint.dtype)  # E[Z 1(state)], state first
    total = torch.zeros_like(z)  # E[G 1(state)]
    zz, gz, gg = (torch.zeros(g, s, dtype=joint.dtype) for _ in range(3))
    for t in range(horizon):
        b, n = baseline[:, t, :, None], here[:, None]
        z_own, g_own = space.own(z), space.own(total)  # (G, S, A)
        z_s, g_s = products(z_own, at.score), products(g_own, at.score)  # <Z, s> for each token
        z_v = products(z_own, at.step) - b * z_s
        g_v = products(g_own, at.step) - b * g_s
        fz = at.later * column
        next_zz = column**2 * zz[..., None] + 2 * column * z_s + n * ss
        next_gz = (
            column * gz[..., None]
            + g_s
            + fz * (column * zz[..., None] + z_s)
            + column * z_v
            + n * (sv - b * ss)
        )
        next_gg = (
            gg[..., None]
            + fz.square() * zz[..., None]
            + n * (vv - 2 * b * sv + b.square() * ss)
            + 2 * (fz * gz[..., None] + g_v + fz * z_v)
        )
        zz, gz, after = (x.reshape(g, -1) @ flat for x in (next_zz, next_gz, next_gg))
        step = (fixed_step - b[..., None] * score_step) * here[:, None, None]
        moved = carry(total, move) + wide * carry(z, pay) + space.place(step)
        z = wide * carry(z, move) + space.place((score_step * here[:, None, None]).expand_as(step))
        if end is not None:
            # what ends now has t + 1 tokens; what ended before has been weighed already
            moved[:, end] = total[:, end] + by_length[t + 1] * (moved[:, end] - total[:, end])
            after[:, end] = gg[:, end] + by_length[t + 1] ** 2 * (after[:, end] - gg[:, end])
        total, gg, here = moved, after, here @ move
    last = by_length[horizon].expand(s).clone()
    if end is not None:
        last[end] = 1
    return torch.einsum("gs...,s->g...", total, last), gg @ last.square()


def products(own: Tensor, vectors: Tensor) -> Tensor:
    """(G, S, A) x (S, Y, A) -> (G, S, Y)."""
    return torch.einsum("gca,cya->gcy", own, vectors)


def carry(vectors: Tensor, move: Tensor) -> Tensor:
    """sum_c move[c, d] vectors[:, c]: (G, S, ...), (S, S) -> (G, S, ...)."""
    g, s = vectors.shape[:2]
    return (move.T @ vectors.reshape(g, s, -1)).reshape(vectors.shape)
