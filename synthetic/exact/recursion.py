"""Moment recursion: mean and mean square of a sum along a Markov chain, without sampling.

Let Z = sum_t gamma^(age) score_t be the discounted scores so far and G the estimate so far. A step
at state c with token y updates G <- G + gamma later Z + step - b score, then Z <- gamma Z + score.
Given the state reached, the first and second moments of (Z, G) follow linear recursions.

A score is a vector over the logits of its own state. With a table of logits it affects only block
c of the gradient, so a step of the recursion is three (S, S) x (S, S*A) products; with shared
parameters, a Jacobian maps it to their space.

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
class TableParameters:
    """Parameter space of a table: the parameters are the logits, and a gradient is (S, A)."""

    num_states: int
    num_actions: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one gradient, (S, A)."""
        return self.num_states, self.num_actions

    def state_products(self, vectors: Tensor) -> Tensor:
        """Return the product of each state's gradient with the logits of that state.

        The product with a logit is the inner product with the logit's gradient.

        Args:
            vectors: (G, S, *shape), one gradient per state.

        Returns:
            (G, S, A) products.
        """
        return vectors.diagonal(dim1=1, dim2=2).mT

    def all_products(self, vectors: Tensor) -> Tensor:
        """Return (G, X, S, A) products of (G, X, *shape) gradients with every state's logits."""
        return vectors

    def inner_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return (..., S, A) inner products of (..., S, A, A) vectors over one state's logits."""
        return (left * right).sum(-1)

    def to_gradients(self, vectors: Tensor) -> Tensor:
        """Map (G, S, A, X) vectors over a state's logits to (G, X, *shape), a sum over states."""
        return vectors.permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class SharedParameters:
    """Parameter space of D parameters that all logits are functions of; a gradient is (D,)."""

    jacobian: Tensor
    """(S, A, D) derivative of the logits."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one gradient, (D,)."""
        return (self.jacobian.shape[-1],)

    def state_products(self, vectors: Tensor) -> Tensor:
        """Return (G, S, A) products of each state's gradient with the logits of that state."""
        return torch.einsum("gcd,cad->gca", vectors, self.jacobian)

    def all_products(self, vectors: Tensor) -> Tensor:
        """Return (G, X, S, A) products of (G, X, D) gradients with every state's logits."""
        return torch.einsum("gxd,cad->gxca", vectors, self.jacobian)

    def inner_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return (..., S, A) inner products in parameter space of vectors over a state's logits."""
        return (left @ self.jacobian * (right @ self.jacobian)).sum(-1)

    def to_gradients(self, vectors: Tensor) -> Tensor:
        """Map (G, S, A, X) vectors over each state's logits to (G, X, D), summed over states."""
        return torch.einsum("gcax,cad->gxd", vectors, self.jacobian)


@dataclass(frozen=True, kw_only=True, eq=False)
class EstimatorRows:
    """Estimators and discounts propagated together; a row is one combination, R in total."""

    gammas: Tensor
    """(R,) discounts."""
    later: Tensor
    """(R, S, A) cost that counts in the credit of earlier tokens."""
    step: Tensor
    """(R, S, A, A) gradient of a token's own term."""
    score: Tensor
    """(R, S, A, A) vector that multiplies the credit."""
    baseline: Tensor
    """(R, T, S) baseline of step and state."""

    @classmethod
    def from_terms(cls, terms_and_baselines: Sequence[tuple[Terms, Tensor]]) -> "EstimatorRows":
        """Build one row for every discount of every pair of terms and baseline (G, T, S)."""

        def stack(name: str) -> Tensor:
            tensors = [getattr(terms, name) for terms, _ in terms_and_baselines]
            return torch.cat(
                [x.expand(len(terms_and_baselines[0][0].gammas), *x.shape) for x in tensors]
            )

        return cls(
            gammas=torch.cat([terms.gammas for terms, _ in terms_and_baselines]),
            later=stack("later"),
            step=stack("step"),
            score=stack("score"),
            baseline=torch.cat([baseline for _, baseline in terms_and_baselines]),
        )


def propagate_moments(
    mdp: TabularMDP,
    measure: Tensor,
    rows: EstimatorRows,
    by_length: Tensor,
    space: TableParameters | SharedParameters,
) -> tuple[Tensor, Tensor]:
    """Compute the mean and the mean squared norm of the estimate after the last step.

    First moments do not depend on second ones, so they are computed first; their contribution to
    the second moments is then computed for all steps at once.

    Args:
        mdp: The world.
        measure: (S, A) weight of a token given the state; need not sum to 1 (an importance weight).
        rows: Estimators and discounts.
        by_length: (T + 1,) factor of a trajectory by its number of tokens.
        space: Space of the parameters.

    Returns:
        (R, *shape) mean and (R,) mean squared norm under the measure.
    """
    # a trajectory is weighted by its length when it reaches the end state, and stops there
    active = mdp.active
    joint = (measure * active[:, None])[..., None] * mdp.transition
    occupancy = [mdp.start]
    for _ in range(mdp.horizon - 1):
        occupancy.append(occupancy[-1] @ joint.sum(1))
    visits = torch.stack(occupancy)
    mean, own_products = _first_moments(rows, joint, visits, by_length, active, space)
    return mean, _second_moments(rows, joint, visits, by_length, active, space, own_products)


def _first_moments(
    rows: EstimatorRows,
    joint: Tensor,
    visits: Tensor,
    by_length: Tensor,
    active: Tensor,
    space: TableParameters | SharedParameters,
) -> tuple[Tensor, Tensor]:
    """Compute the first moments of the recursion.

    Args:
        rows: Estimators and discounts.
        joint: (S, A, S) measure of token and next state.
        visits: (T, S) measure of a state at each step.
        by_length: (T + 1,) factor of a trajectory by its number of tokens.
        active: (S,) 1, or 0 at the end state.
        space: Space of the parameters.

    Returns:
        (R, *shape) E[G by_length], and (T, 2, R, S, A) of E[Z; c] and E[G; c] before each step. The
        latter are stored as products with the logits of state c, all that a step at c needs.
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
    without_baseline = not bool(rows.baseline.any())

    state_moments = joint.new_zeros(r, 2 * s, size)  # E[Z 1(state)], E[G 1(state)]
    own_products = joint.new_empty(horizon, 2, r, s, a)
    mean = joint.new_zeros(r, size)
    for t in range(horizon):
        for index, vectors in enumerate(state_moments.view(r, 2, s, *space.shape).unbind(1)):
            own_products[t, index] = space.state_products(vectors)
        state_moments = step @ state_moments
        n = visits[t, :, None, None]
        new_scores, new_steps = score_step * n, fixed_step * n
        if not without_baseline:
            new_steps = new_steps - rows.baseline[:, t, :, None, None] * new_scores
        state_moments[:, :s] += space.to_gradients(new_scores).reshape(r, s, size)
        state_moments[:, s:] += space.to_gradients(new_steps).reshape(r, s, size)
        mean += by_length[t + 1] * ((1 - active) @ state_moments[:, s:])
    mean += by_length[horizon] * (active @ state_moments[:, s:])
    return mean.view(r, *space.shape), own_products


def _second_moments(
    rows: EstimatorRows,
    joint: Tensor,
    visits: Tensor,
    by_length: Tensor,
    active: Tensor,
    space: TableParameters | SharedParameters,
    own_products: Tensor,
) -> Tensor:
    """Return (R,) E[|G|^2 by_length^2], from E|Z|^2, E<G, Z> and E|G|^2 at each state.

    Args:
        rows: Estimators and discounts.
        joint: (S, A, S) measure of token and next state.
        visits: (T, S) measure of a state at each step.
        by_length: (T + 1,) factor of a trajectory by its number of tokens.
        active: (S,) 1, or 0 at the end state.
        space: Space of the parameters.
        own_products: (T, 2, R, S, A) as returned by `_first_moments`.

    Returns:
        (R,) mean squared norm.
    """
    (r, s, a), horizon, gammas = rows.later.shape, len(visits), rows.gammas[:, None, None]
    # inner products of score (s) and step (v); fz is the factor of Z in the later costs
    ss, sv = (
        space.inner_products(rows.score, rows.score),
        space.inner_products(rows.score, rows.step),
    )
    vv, fz = space.inner_products(rows.step, rows.step), rows.later * gammas
    b, n = rows.baseline.transpose(0, 1)[..., None], visits[:, None, :, None]  # (T, R, S, 1)
    projections = torch.einsum(
        "thrca,rcya->thrcy", own_products, torch.cat([rows.score, rows.step], 2)
    )
    (z_s, z_v), (g_s, g_v) = (x.split(a, -1) for x in projections.unbind(1))
    z_v, g_v = z_v - b * z_s, g_v - b * g_s
    inflow_zz = 2 * gammas * z_s + n * ss
    inflow_gz = g_s + fz * z_s + gammas * z_v + n * (sv - b * ss)
    inflow_gg = n * (vv - 2 * b * sv + b.square() * ss) + 2 * (g_v + fz * z_v)
    flat_joint = joint.reshape(s * a, s)
    inflow = torch.cat(
        [x.reshape(horizon, r, -1) @ flat_joint for x in (inflow_zz, inflow_gz, inflow_gg)], -1
    )

    move, cost, cost2 = (
        torch.einsum("rca,cad->rcd", x, joint)
        for x in (torch.ones_like(rows.later), rows.later, rows.later.square())
    )
    step = joint.new_zeros(r, 3, s, 3, s)
    step[:, 0, :, 0] = gammas**2 * move
    step[:, 0, :, 1] = gammas**2 * cost
    step[:, 0, :, 2] = gammas**2 * cost2
    step[:, 1, :, 1] = gammas * move
    step[:, 1, :, 2] = 2 * gammas * cost
    step[:, 2, :, 2] = move
    step = step.reshape(r, 3 * s, 3 * s)
    second_moments = joint.new_zeros(r, 1, 3 * s)
    estimate_squares = joint.new_empty(horizon, r, s)
    for t in range(horizon):
        second_moments = torch.baddbmm(inflow[t, :, None], second_moments, step)
        estimate_squares[t] = second_moments[:, 0, 2 * s :]
    length_weights = by_length[1:].square()
    return torch.einsum(
        "t,trs,s->r", length_weights, estimate_squares, 1 - active
    ) + length_weights[-1] * (estimate_squares[-1] @ active)


def logit_products(state_vectors: Tensor, vectors: Tensor) -> Tensor:
    """Return (G, S, Y) products of (G, S, A) and (S, Y, A)."""
    return torch.einsum("gca,cya->gcy", state_vectors, vectors)


def apply_transition(vectors: Tensor, move: Tensor) -> Tensor:
    """Return sum_c move[c, d] vectors[:, c] of (G, S, ...) vectors and an (S, S) matrix."""
    g, s = vectors.shape[:2]
    return (move.T @ vectors.reshape(g, s, -1)).reshape(vectors.shape)
