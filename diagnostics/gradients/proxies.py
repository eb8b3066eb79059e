"""Gradient-noise proxies of other systems (E-10), for comparison, each with what it misestimates.

Use `diagnostics.gradients.signal_noise` for the quantities themselves. Shapes: B responses, T
positions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput


def scalar_advantage_variance(advantage: Tensor, score_square: Tensor, mask: Tensor) -> Tensor:
    """Return verl's total power, mean_i (mean_t A_it)^2 sum_t w_t.

    With w = 1 - 2 p(y) + sum_v p(v)^2. Intended for advantages that are constant along a response.
    In distillation the cost of a token alternates in sign, so squaring the *mean* discards most of
    the power: the result is 1 to 20 % of the exact variance at gamma = 0 on tabular worlds, less
    the longer the response, and 60 to 75 % of the exact variance of costs to go
    (`benchmarks.estimates`). verl subtracts the squared norm of the batch's gradient in parameter
    space from this number, which is in logit space and of one response; the difference is not a
    variance of any quantity, and that part is not reproduced. (verl, docs/algo/otb.md and its
    metric utilities.)

    Args:
        advantage: (B, T) -cost.
        score_square: (B, T) w.
        mask: (B, T).

    Returns:
        Scalar, float64.
    """
    length = mask.sum(1).clamp(min=1)
    mean = (advantage.double() * mask).sum(1) / length
    return (mean.square() * (score_square.double() * mask).sum(1)).mean()


def token_advantage_variance(advantage: Tensor, score_square: Tensor, mask: Tensor) -> Tensor:
    """Return mean_i sum_t A_it^2 w_t, the diagonal of E|g|^2 at gamma = 0.

    A corrected form of verl's proxy. It omits the products of different tokens of a response, the
    signal included, and the lengths of hidden states. At gamma = 0 it was 83 to 88 % of the exact
    variance in worlds that mix, but 41 % at 8 tokens and 5 % at 96 where states persist; with costs
    to go, which dominate the rest, 80 to 100 % (`benchmarks.estimates`).

    Args:
        advantage: (B, T) -cost.
        score_square: (B, T) w.
        mask: (B, T).

    Returns:
        Scalar, float64.
    """
    return (advantage.double().square() * score_square.double() * mask).sum(1).mean()


def adam_noise(
    states: Iterable[tuple[Tensor, Tensor]], step: int, betas: tuple[float, float]
) -> Tensor:
    """Return vOPD's noise, the sum of v_hat - m_hat^2 over parameters, from Adam's own moments.

    For independent batch gradients of one distribution its mean is tr Cov(batch mean) * 2 beta1 /
    (1 + beta1) once step is large, 0.947 of it at beta1 = 0.9. So it describes the *batch*, after
    clipping, and a mixture of about 1/(1 - beta2) policies; a mean gradient that drifts or turns
    over that time counts as noise. A cheap trend, not a variance at a policy. (2605.07865.)

    Args:
        states: (exp_avg, exp_avg_sq) of every parameter.
        step: Number of updates, at least 1.
        betas: Adam's beta1 and beta2.

    Returns:
        Scalar, float64.

    Raises:
        InvalidInput: step is below 1.
    """
    if step < 1:
        raise InvalidInput(
            f"step is {step}; Adam has no moments before the first update, so step must be >= 1"
        )
    bias_1, bias_2 = (1 - beta**step for beta in betas)
    parts = [(v.double() / bias_2 - (m.double() / bias_1).square()).sum() for m, v in states]
    return torch.stack(parts).sum()
