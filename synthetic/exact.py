"""The truth about the gamma family: exact expected gradients and the exact sequence KL."""

import torch
from torch import Tensor

from opd.objectives import check_gamma
from synthetic.mdp import TabularMDP


def sequence_kl(mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """J = E[sum_t r_t], the KL of whole trajectories; differentiable in the student's logits."""
    p, cost = _policy(mdp, student_logits, teacher_logits)
    occupancy, total = mdp.start, student_logits.new_zeros((), dtype=torch.float64)
    for _ in range(mdp.horizon):
        total = total + (occupancy[:, None] * p * cost).sum()
        occupancy = torch.einsum("s,sa,sax->x", occupancy, p, mdp.transition)
    return total


def expected_gradient(
    mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor, gamma: float
) -> Tensor:
    """E[sum_t s_t (r_t + gamma V_{t+1})] for the score s, (S, A) in logit space.

    V_t(c) = E[r_t + gamma V_{t+1} | c]. gamma = 1 is the gradient of `sequence_kl`, gamma = 0 the
    gradient with the visited states frozen.
    """
    check_gamma(gamma)
    p, cost = _policy(mdp, student_logits.detach(), teacher_logits.detach())
    after = [mdp.start.new_zeros(len(mdp.start))]
    for _ in range(mdp.horizon):
        q = cost + gamma * mdp.transition @ after[-1]
        after.append((p * q).sum(1))
    occupancy, gradient = mdp.start, torch.zeros_like(p)
    for t in range(mdp.horizon):
        q = cost + gamma * mdp.transition @ after[mdp.horizon - t - 1]
        centred = q - (p * q).sum(1, keepdim=True)
        gradient += (occupancy * mdp.active)[:, None] * p * centred
        occupancy = torch.einsum("s,sa,sax->x", occupancy, p, mdp.transition)
    return gradient


def _policy(mdp: TabularMDP, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(S, A) action probabilities and costs; the end state costs nothing."""
    ours, theirs = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return ours.exp(), (ours - theirs) * mdp.active[:, None]
