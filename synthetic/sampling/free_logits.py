"""Local objectives on independent prefixes, each with free logits of its own.

Shapes: S prefixes, A tokens.
"""

import torch
from torch import Tensor

from opd.objectives.objective import Objective
from synthetic.sampling.monte_carlo import visit_gradients
from synthetic.sampling.trajectories import score_with_tables, with_support
from synthetic.worlds.mdp import log_probabilities


def expected_gradients(
    student: Tensor, teacher: Tensor, objective: Objective, k: int | None
) -> Tensor:
    """Compute the expected gradient of a local objective at each prefix.

    The expectation over the sampled token is the sum over all tokens, each a response of its own.

    Args:
        student: (S, A) logits.
        teacher: (S, A) logits.
        objective: A local objective.
        k: Size of the support, for top-K objectives.

    Returns:
        (S, A) gradient with respect to the student's logits.
    """
    s, a = student.shape
    student_logp = log_probabilities(student, "student")
    teacher_logp = log_probabilities(teacher, "teacher")
    states = torch.arange(s).repeat_interleave(a)[:, None]
    tokens = torch.arange(a).repeat(s)[:, None]
    active = torch.ones(s, dtype=torch.float64)
    trajectories = score_with_tables(
        student_logp, teacher_logp, student_logp.exp(), active, states, tokens
    )
    trajectories = with_support(trajectories, student, teacher, objective.support, k)
    token_gradients = visit_gradients(
        trajectories, student, objective, objective.credit(trajectories.batch)
    )
    return (student_logp.exp()[..., None] * token_gradients.view(s, a, a)).sum(1)
