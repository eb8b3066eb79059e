"""The truth: sequence KL, expected gradients and total variances without sampling.

The moments of an estimator are propagated forward jointly with the state. The score of token y at
state c, e_(c,y) - p(.|c), touches block c of the gradient only, which turns a step of the recursion
into three (S, S) x (S, S*A) products instead of a loop over states, tokens and parameters.

Shapes: S states, A actions, T steps, G discounts. Everything is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives import check_gamma
from synthetic.mdp import TabularMDP
from synthetic.terms import ESTIMATORS, Estimator, Terms, terms

__all__ = ["ESTIMATORS", "SequenceKL", "expected_gradient", "moments", "sequence_kl"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceKL:
    """J = E[sum_t r_t] and its parts; with live student logits every field carries gradient.

    total (): J in nats; occupancy (T, S): probability of state c at step t; local (S,): KL of the
    two policies at a state (0 at the end state); value (T, S): expected cost from step t on.
    """

    total: Tensor
    occupancy: Tensor
    local: Tensor
    value: Tensor


def sequence_kl(mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor) -> SequenceKL:
    """KL of the student's distribution over sequences from the teacher's, J = sum_t d_t . K.

    With `occupancy` detached, sum_t d_t . K is the frozen-prefix objective of gamma = 0.
    """
    at = terms(mdp, student_logits, teacher_logits, torch.ones(1, dtype=torch.float64))
    total = (at.occupancy @ at.local).sum()
    return SequenceKL(total=total, occupancy=at.occupancy, local=at.local, value=at.values[0, :-1])


@torch.no_grad()
def expected_gradient(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    gamma: float | Sequence[float],
) -> Tensor:
    """Expected gradient of the gamma family, sum_t E[s_t (r_t + gamma V_(t+1))].

    gamma = 1 is the gradient of the sequence KL; gamma = 0 that of the KL with frozen prefixes;
    between them it is not the gradient of anything. (arXiv 2603.25562, eq. 3.)

    Returns:
      (S, A) per trajectory, or (G, S, A) for a sequence of discounts.
    """
    grid = _grid(gamma)
    at = terms(mdp, student_logits, teacher_logits, grid)
    # transitions do not depend on the step, so occupancy-weighted values suffice
    weighted = torch.einsum("tc,gtd->gcd", at.occupancy, at.values[:, 1:])
    future = torch.einsum("cad,gcd->gca", mdp.transition, weighted)
    cost = at.occupancy.sum(0)[:, None] * at.r + grid[:, None, None] * future
    mean = (at.p * cost).sum(-1, keepdim=True)
    gradient = at.p * (cost - mean)
    return gradient[0] if isinstance(gamma, float | int) else gradient


def _grid(gamma: float | Sequence[float]) -> Tensor:
    values = [float(gamma)] if isinstance(gamma, float | int) else [float(x) for x in gamma]
    if not values:
        raise ValueError("gamma is an empty sequence")
    for value in values:
        check_gamma(value)
    return torch.tensor(values, dtype=torch.float64)


# --- moments ------------------------------------------------------------------------------------


@torch.no_grad()
def moments(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    estimator: str = "plain",
    gamma: float | Sequence[float] = 0.0,
) -> tuple[Tensor, Tensor]:
    """Exact mean and total variance (trace of the covariance) of one trajectory's gradient.

    With Z = sum_t gamma^(age) s_t the discounted sum of scores and G the estimate so far, a step is
    G <- G + gamma f Z + beta, Z <- gamma Z + s. Its first and second moments, conditional on the
    state reached, obey linear recursions; E|G|^2 - |E G|^2 is the answer.

    Returns:
      mean (S, A) and variance (); for a sequence of G discounts (G, S, A) and (G,).

    Raises:
      ValueError: an estimator not in ESTIMATORS, or a discount outside [0, 1].
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    grid = _grid(gamma)
    at = terms(mdp, student_logits, teacher_logits, grid)
    mean, square = _propagate(mdp, at, ESTIMATORS[estimator](at))
    variance = (square - mean.square().sum((-1, -2))).clamp(min=0)
    return (mean[0], variance[0]) if isinstance(gamma, float | int) else (mean, variance)


def _propagate(mdp: TabularMDP, at: Terms, of: Estimator) -> tuple[Tensor, Tensor]:
    """(G, S, A) mean and (G,) mean squared norm after the last step."""
    (s, a), g = at.p.shape, len(at.gammas)
    on, f, v = at.active[:, None], of.future, of.vector.expand(s, a)
    column = at.gammas[:, None, None]
    joint = at.p[..., None] * mdp.transition  # (S, A, S): token and next state given the state
    flat = joint.reshape(s * a, s)
    # inner products of s, v at one state, each over its token; what is wrong at the absorbing end
    # state stays there, since no weight, cost or vector is paid at it
    ss = 1 - 2 * at.p + at.p.square().sum(-1, keepdim=True)
    sv = v - (at.p * v).sum(-1, keepdim=True)
    vv = v.square().sum(-1, keepdim=True)
    # block c of E[s 1(next)], E[w s 1(next)] + v P(next) given c
    score_step = _block(joint, at.p, on.expand(s, a))
    fixed_step = _block(joint, at.p, of.weight * on) + v[..., None] * at.move[:, None, :]
    pay = torch.einsum("ca,cad->cd", f, joint)
    diagonal = torch.arange(s)
    baseline = of.baseline.expand(g, mdp.horizon, s)

    z = torch.zeros(g, s, s, a, dtype=at.p.dtype)  # E[Z 1(state)], then block, then token
    total = torch.zeros_like(z)  # E[G 1(state)]
    zz, gz, gg = (torch.zeros(g, s, dtype=at.p.dtype) for _ in range(3))
    for t in range(mdp.horizon):
        here = at.occupancy[t]
        w = (of.weight - baseline[:, t, :, None]) * on  # (G, S, A)
        z_own, g_own = z[:, diagonal, diagonal], total[:, diagonal, diagonal]  # (G, S, A)
        z_s = z_own - (at.p * z_own).sum(-1, keepdim=True)  # <Z, s> for each token
        g_s = g_own - (at.p * g_own).sum(-1, keepdim=True)
        z_v, g_v = (z_own * v).sum(-1, keepdim=True), (g_own * v).sum(-1, keepdim=True)
        z_beta, g_beta = w * z_s + z_v, w * g_s + g_v
        n = here[:, None]
        fz = f * column
        next_zz = column**2 * zz[..., None] + 2 * column * z_s + n * ss
        next_gz = (
            column * gz[..., None]
            + g_s
            + fz * (column * zz[..., None] + z_s)
            + column * z_beta
            + n * (w * ss + sv)
        )
        next_gg = (
            gg[..., None]
            + fz.square() * zz[..., None]
            + n * (w.square() * ss + 2 * w * sv + vv)
            + 2 * (fz * gz[..., None] + g_beta + fz * z_beta)
        )
        zz, gz, gg = (x.reshape(g, -1) @ flat for x in (next_zz, next_gz, next_gg))
        step = fixed_step - baseline[:, t, :, None, None] * score_step  # (G, S, A, S)
        total = _carry(total, at.move) + column[..., None] * _carry(z, pay)
        total += (here[:, None, None] * step).permute(0, 3, 1, 2)
        z = column[..., None] * _carry(z, at.move)
        z += (here[:, None, None] * score_step).permute(2, 0, 1)
    return total.sum(1), gg.sum(1)


def _block(joint: Tensor, p: Tensor, weight: Tensor) -> Tensor:
    """(S, A, S): block c of E[weight s 1(next) | c]; joint (S, A, S), p and weight (S, A)."""
    paid = weight[..., None] * joint
    return paid - p[..., None] * paid.sum(1, keepdim=True)


def _carry(vectors: Tensor, move: Tensor) -> Tensor:
    """sum_c move[c, d] vectors[:, c]: (G, S, S, A), (S, S) -> (G, S, S, A)."""
    g, s = vectors.shape[:2]
    return (move.T @ vectors.reshape(g, s, -1)).reshape(vectors.shape)
