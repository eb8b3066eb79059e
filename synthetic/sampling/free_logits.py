"""Local objectives on independent prefixes, each with free logits of its own.

Shapes: S prefixes, A tokens.
"""

import torch
from torch import Tensor

from opd.objectives.objective import Objective
from synthetic.sampling.monte_carlo import visit_gradients
from synthetic.sampling.trajectories import score_trajectories, with_support
from synthetic.worlds.mdp import TabularMDP


def independent_prefixes(count: int, actions: int) -> TabularMDP:
    """Return a world in which every state is a start state and a response is one token."""
    transition = torch.eye(count, dtype=torch.float64)[:, None].expand(-1, actions, -1)
    return TabularMDP(transition, torch.full((count,), 1 / count, dtype=torch.float64), 1)


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
    mdp = independent_prefixes(s, a)
    states = torch.arange(s).repeat_interleave(a)[:, None]
    tokens = torch.arange(a).repeat(s)[:, None]
    trajectories = score_trajectories(mdp, student, teacher, states, tokens)
    trajectories = with_support(trajectories, student, teacher, objective.support, k)
    token_gradients = visit_gradients(
        trajectories, student, objective, objective.credit(trajectories.batch)
    )
    return (student.softmax(-1)[..., None] * token_gradients.view(s, a, a)).sum(1)
