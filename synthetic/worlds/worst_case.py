"""Worst-case variance: the published bounds, tight bounds, and worlds that attain them.

Let |r_t| <= R and |s_t| <= B for all t. The published argument bounds the norm of the sum by the
sum of norms: |g| <= T R B for gamma = 0, and T^2 R B for the product of all costs with all scores,
so that E|g|^2 <= R^2 B^2 T^2 and R^2 B^2 T^4 (arXiv 2603.25562, app. D).

The tight bound. Group by cost, g = sum_u r_u Z_u with Z_u = sum_{t<=u} gamma^(u-t) s_t. Scores are
martingale differences: for t < v, E<s_t, s_v> = E<s_t, E[s_v | prefix]> = 0. So
E|Z_u|^2 = sum_{t<=u} gamma^(2(u-t)) E|s_t|^2 <= B^2 sum_{j<u} gamma^(2j), and by Cauchy-Schwarz
over the T costs

    E|g|^2 <= T sum_u E[r_u^2 |Z_u|^2] <= R^2 B^2 T sum_{u<=T} sum_{j<u} gamma^(2j)
           <= R^2 B^2 T^2 min((T + 1) / 2, 1 / (1 - gamma^2)).

The sequence level is cubic in T, not quartic, and every gamma < 1 is quadratic. Constant costs
attain the cubic order: g = R sum_t (T - t + 1) s_t has E|g|^2 = R^2 B^2 T (T + 1) (2 T + 1) / 6,
which is T^3 / 3 to leading order, two thirds of the bound.
"""

import math

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.worlds.mdp import TabularMDP


def bounds(
    mdp: TabularMDP, student_logits: Tensor, teacher_logits: Tensor, gamma: float
) -> tuple[float, float]:
    """Return the tight and the published bound of E|g_gamma|^2.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        gamma: Discount.

    Returns:
        Both in nats^2; the published one is R^2 B^2 T^4.
    """
    logp = mdp.log_policy(student_logits)
    p = logp.exp()
    cost2 = float((logp - mdp.log_policy(teacher_logits)).square().max())
    score2 = float((1 - 2 * p + p.square().sum(-1, keepdim=True)).max())
    t = mdp.horizon
    age_factor = (t + 1) / 2 if gamma == 1 else min((t + 1) / 2, 1 / (1 - gamma**2))
    return cost2 * score2 * t**2 * age_factor, cost2 * score2 * t**4


def constant_cost(
    horizon: int, cost: float = 1.0, rare_probability: float = 1e-12
) -> tuple[TabularMDP, Tensor, Tensor]:
    """Build a world in which every token costs `cost` nats and its score has constant norm.

    One state and two tokens of equal student probability. The teacher gives e^-cost of that to each
    and the rest to a third token, which the student samples with negligible probability.

    Args:
        horizon: Number of steps.
        cost: Cost of a token in nats, positive.
        rare_probability: The student's probability of the third token.

    Returns:
        The world, and student and teacher logits.

    Raises:
        InvalidInput: If the cost is not positive.
    """
    if not cost > 0:
        raise InvalidInput(f"cost is {cost}, expected a positive number of nats")
    mdp = TabularMDP(torch.ones(1, 3, 1), torch.ones(1), horizon)
    student = torch.tensor(
        [[(1 - rare_probability) / 2, (1 - rare_probability) / 2, rare_probability]],
        dtype=torch.float64,
    )
    teacher_probability = math.exp(-cost) * (1 - rare_probability) / 2
    teacher = torch.tensor(
        [[teacher_probability, teacher_probability, 1 - 2 * teacher_probability]],
        dtype=torch.float64,
    )
    return mdp, student.log(), teacher.log()
