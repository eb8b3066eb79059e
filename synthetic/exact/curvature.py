"""Exact second-order effect of one gradient step on the sequence KL: slope, curvature and noise.

To second order in the step size eta, a step along the mean of n estimates g changes J by

    -eta <grad J, E g> + eta^2 / 2 (E g' H E g + tr(H Cov g) / n),

with H the Hessian of J. Bias is harmless as long as it points downhill; the cost of noise depends
on the curvature along it. Shapes: E estimators, G discounts, S states, A actions; D = S A.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthetic.exact import moments
from synthetic.worlds.mdp import TabularMDP


@dataclass(frozen=True, kw_only=True, eq=False)
class StepEffect:
    """Second-order terms of one step, for each estimator and discount (E, G)."""

    slope: Tensor
    """<grad J, E g>."""
    curvature: Tensor
    """E g' H E g."""
    noise: Tensor
    """tr(H Cov g) of one trajectory; negative where the noise lies along negative curvature."""


def hessian(mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the (D, D) Hessian of the sequence KL with respect to the student's logits."""

    def flat_sequence_kl(flat: Tensor) -> Tensor:
        return moments.sequence_kl(mdp, flat.view_as(student_logits), teacher_logits).total

    flat_logits = student_logits.detach().to(torch.float64).flatten()
    return torch.autograd.functional.hessian(flat_sequence_kl, flat_logits, vectorize=True)


def step_effect(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    estimators: Sequence[str],
    gammas: Sequence[float],
) -> StepEffect:
    """Compute the exact slope, curvature and noise of a step.

    tr(H Cov) is computed as a total variance in the coordinates sqrt(|H|): that of the directions
    of positive curvature less that of the negative ones.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        estimators: Names in `ESTIMATORS`.
        gammas: Discounts.

    Returns:
        The three terms, each (E, G).
    """
    logits = student_logits, teacher_logits
    mean, _ = moments.moments(mdp, *logits, estimators, gammas)
    mean, hessian_matrix = mean.flatten(2), hessian(mdp, *logits)
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian_matrix)
    noise = torch.zeros(mean.shape[:2], dtype=torch.float64)
    for sign in (1, -1):
        scaled_directions = (eigenvectors * (sign * eigenvalues).clamp(min=0).sqrt()).view(
            *student_logits.shape, -1
        )
        noise += (
            sign * moments.moments(mdp, *logits, estimators, gammas, jacobian=scaled_directions)[1]
        )
    slope = mean @ moments.expected_gradient(mdp, *logits, 1.0).flatten()
    return StepEffect(slope=slope, curvature=((mean @ hessian_matrix) * mean).sum(-1), noise=noise)
