"""What one step of descent is worth: slope, curvature and noise of the sequence KL, exactly.

To second order in the step size eta, a step along the mean of n estimates g changes J by

    -eta <grad J, E g> + eta^2 / 2 (E g' H E g + tr(H Cov g) / n),

H the Hessian of J. Bias costs nothing as far as it points downhill, and noise costs by the
curvature along it. Shapes: E estimators, G discounts, S states, A actions; D = S A.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthetic.exact import moments
from synthetic.worlds.mdp import TabularMDP


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """Of estimators and discounts (E, G): slope <grad J, E g>, curvature E g' H E g, and noise
    tr(H Cov g) of one trajectory, which is negative where the noise lies along negative curvature.
    """

    slope: Tensor
    curvature: Tensor
    noise: Tensor


def hessian(mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(D, D) second derivatives of the sequence KL with respect to the student's logits."""

    def total(flat: Tensor) -> Tensor:
        return moments.sequence_kl(mdp, flat.view_as(student_logits), teacher_logits).total

    start = student_logits.detach().to(torch.float64).flatten()
    return torch.autograd.functional.hessian(total, start)


def step(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    estimators: Sequence[str],
    gammas: Sequence[float],
) -> Step:
    """Exact. tr(H Cov) is the total variance in the coordinates sqrt(|H|), of the directions of
    positive curvature less that of the negative ones.
    """
    pair = student_logits, teacher_logits
    mean, _ = moments.moments(mdp, *pair, estimators, gammas)
    mean, curved = mean.flatten(2), hessian(mdp, *pair)
    bend, along = torch.linalg.eigh(curved)
    noise = torch.zeros(mean.shape[:2], dtype=torch.float64)
    for sign in (1, -1):
        scaled = (along * (sign * bend).clamp(min=0).sqrt()).view(*student_logits.shape, -1)
        noise += sign * moments.moments(mdp, *pair, estimators, gammas, jacobian=scaled)[1]
    slope = mean @ moments.expected_gradient(mdp, *pair, 1.0).flatten()
    return Step(slope=slope, curvature=((mean @ curved) * mean).sum(-1), noise=noise)
