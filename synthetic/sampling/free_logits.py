"""Independent prefixes with free logits: local objectives without a world around them.

Shapes: S prefixes, A tokens.
"""

import torch
from torch import Tensor

from opd.objectives.factory import Objective
from synthetic.sampling.monte_carlo import visit_gradients
from synthetic.sampling.trajectories import scored, with_support
from synthetic.worlds.mdp import TabularMDP


def prefixes(count: int, actions: int) -> TabularMDP:
    """Every state is a start, and a response is one token."""
    stay = torch.eye(count, dtype=torch.float64)[:, None].expand(-1, actions, -1)
    return TabularMDP(stay, torch.full((count,), 1 / count, dtype=torch.float64), 1)


def expected(student: Tensor, teacher: Tensor, objective: Objective, k: int | None) -> Tensor:
    """(S, A) expected gradient of a local objective at each prefix with respect to its logits.

    The expectation over the sampled token is the sum over all of them, each a response of its own.
    """
    s, a = student.shape
    world = prefixes(s, a)
    states = torch.arange(s).repeat_interleave(a)[:, None]
    tokens = torch.arange(a).repeat(s)[:, None]
    at = scored(world, student, teacher, states, tokens)
    at = with_support(at, student, teacher, objective.support, k)
    each = visit_gradients(at, student, objective, objective.credit(at.batch))
    return (student.softmax(-1)[..., None] * each.view(s, a, a)).sum(1)
