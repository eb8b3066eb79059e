"""Gradient-noise proxies of other systems (E-10), for comparison, with what they get wrong.

Use `diagnostics.gradients.signal_noise` for the quantities themselves. Shapes: B responses, T positions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput


def scalar_advantage_variance(advantage: Tensor, score_square: Tensor, mask: Tensor) -> Tensor:
    """verl's total power: mean_i (mean_t A_it)^2 sum_t w_t, w = 1 - 2 p(y) + sum_v p(v)^2.

    Meant for advantages that are constant along a response. In distillation the cost of a token
    alternates in sign, so that squaring the *mean* throws most of the power away: 1 to 20 % of the
    exact variance at gamma = 0 on tabular worlds, less the longer the response; 60 to 75 % of that
    of costs to go (`benchmarks.estimates`). From this number,
    which is in logit space and of one response, verl subtracts the squared norm of the batch's
    gradient in parameter space; the difference is the variance of nothing, and that part is not
    reproduced. (verl, docs/algo/otb.md and its metric utilities.)

    Args:
      advantage: (B, T) -cost; score_square: (B, T) w; mask: (B, T).
    """
    length = mask.sum(1).clamp(min=1)
    mean = (advantage.double() * mask).sum(1) / length
    return (mean.square() * (score_square.double() * mask).sum(1)).mean()


def token_advantage_variance(advantage: Tensor, score_square: Tensor, mask: Tensor) -> Tensor:
    """The repair in the same spirit: mean_i sum_t A_it^2 w_t, the diagonal of E|g|^2 at gamma = 0.

    Leaves out what tokens of a response have in common (the products of different t), the signal
    included, and the lengths of hidden states. At gamma = 0 that was 83 to 88 % of the exact
    variance in worlds that mix, but 41 % at 8 tokens and 5 % at 96 where states persist; with costs
    to go, whose sizes dwarf the rest, 80 to 100 % (`benchmarks.estimates`).
    """
    return (advantage.double().square() * score_square.double() * mask).sum(1).mean()


def adam_noise(
    states: Iterable[tuple[Tensor, Tensor]], step: int, betas: tuple[float, float]
) -> Tensor:
    """vOPD's log: sum of v_hat - m_hat^2 over parameters, from Adam's own moments.

    For independent batch gradients of one distribution its mean is tr Cov(batch mean) * 2 beta1 /
    (1 + beta1) once step is large, 0.947 of it at beta1 = 0.9. So it is about the *batch*, after
    clipping, a mixture of about 1/(1 - beta2) policies, and a mean gradient that drifts or turns
    over that time is counted as noise. A cheap trend, not a variance at a policy. (2605.07865.)

    Args:
      states: (exp_avg, exp_avg_sq) of every parameter; step: number of updates, at least 1.
    """
    if step < 1:
        raise InvalidInput(f"step is {step}; Adam has no moments before its first update")
    first, second = (1 - beta**step for beta in betas)
    parts = [(v.double() / second - (m.double() / first).square()).sum() for m, v in states]
    return torch.stack(parts).sum()
