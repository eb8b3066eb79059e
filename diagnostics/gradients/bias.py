"""Bias of cutting the future (E-4), coherence (E-9), and the member of least error at a batch size.

The bias of a discount is E[g at gamma] - E[g at 1], measured as a vector on one low-noise member.
Its squared length is a difference of the unbiased inner products of `diagnostics.gradients.signal_noise`, never
the squared length of a mean: with 32 sequences that came out 50 times too large in the study.

Shapes: B responses, T positions, G discounts, F = members * G, R replicates.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput
from diagnostics.gradients.estimators import Grid, member_index
from diagnostics.gradients.jackknife import Estimate, squared
from diagnostics.gradients.signal_noise import Pairs

REFERENCES = ("rb_all_position_mean", "rb_all", "position_mean", "plain")
"""Members by which bias is measured, least noise first."""


def reference(at: Grid) -> str:
    """The best of REFERENCES that was measured.

    Raises:
      Missing: none was, or the discounts do not contain 0 and 1.
    """
    known = [name for name in REFERENCES if name in at.names]
    if not known or not {0.0, 1.0} <= set(at.gammas):
        raise MissingField(
            f"bias needs one of {', '.join(REFERENCES)} at the discounts 0 and 1; there are "
            f"{', '.join(at.names)} at {list(at.gammas)}"
        )
    return known[0]


def squared_bias(found: Pairs, at: Grid) -> Tensor:
    """(R, G) |E g(gamma) - E g(1)|^2, unbiased; may be negative where there is little; 0 at 1."""
    name = reference(at)
    own = [member_index(at, name, gamma) for gamma in at.gammas]
    whole, a = member_index(at, name, 1.0), found.apart
    square = a[:, own, own] - 2 * a[:, own, whole] + a[:, whole, whole][:, None]
    return square * square.new_tensor([gamma != 1 for gamma in at.gammas])


def occupancy(found: Pairs, at: Grid) -> dict[str, Estimate]:
    """E-4: what token-level distillation (gamma = 0) leaves out of the gradient of the sequence KL.

    With g = E[g at 0], which pulls the student to the teacher on the prefixes as they are, and
    h = E[g at 1] - g, which moves the student to other prefixes:
    - alpha = <h, g> / |g|^2: 1 + alpha is the progress of a step along the whole gradient relative
      to what g alone accounts for; occupancy_square = |h|^2;
    - cosine of g and g + h; bias_share = |h| / |g + h|.
    Ratios and the cosine are NaN where a squared length in a denominator is not distinguishable
    from 0. Access: G. Source: "Vanishing Learning Signals", whose median 1 + alpha lay between 0.1
    and 1.1 with quartiles from -2.3 to 1.5: one checkpoint's value says little, its interval says
    how little. Here the denominators are sums over a sequence, not its mean, for which g and h
    would be others. Healthy: near the teacher h is small against g. alpha below -1 says that the
    two pull against each other.
    """
    name = reference(at)
    zero, one, a = member_index(at, name, 0.0), member_index(at, name, 1.0), found.apart
    g, whole, along = a[:, zero, zero], a[:, one, one], a[:, zero, one]
    h = g - 2 * along + whole
    share = squared(found.ratio(h, whole))
    roots = {x: _root(getattr(share, x)) for x in ("value", "low", "high")}
    slope = 2 * roots["value"] if roots["value"] else math.nan  # of the square, by the chain rule
    alpha = found.ratio(along - g, g)
    resolved = not (math.isnan(alpha.value) or math.isnan(share.value))
    product = (g * whole).clamp(min=torch.finfo(g.dtype).tiny).sqrt()
    apart = squared(found.ratio(product - along if resolved else along * math.nan, product))
    return {
        "alpha": alpha,
        "occupancy_square": squared(found.estimate(h)),
        "bias_share": replace(
            share, **roots, error=share.error / slope, sketch=share.sketch / slope
        ),
        "cosine": replace(apart, value=1 - apart.value, low=1 - apart.high, high=1 - apart.low),
    }


def _root(x: float) -> float:
    return x if math.isnan(x) else math.sqrt(max(x, 0.0))


def coherence(found: Pairs, energies: Tensor, prompt: Tensor, member: int) -> Estimate:
    """E-9: E|sum_t x_t|^2 / E sum_t |x_t|^2 of one member's token gradients x_t.

    1 where tokens of a sequence are orthogonal on average, far above where they push in one
    direction (their count, if in exactly one), below where they cancel. Scores times constants give
    1: they are martingale differences. Access: G. Source: derived; tests 2604.13016's remark that
    anisotropic advantages cancel.

    Args:
      energies: (n, F) as `diagnostics.gradients.sketch.token_energies` returns them; prompt: (n,).
    """
    mean = without_each(energies[:, member], prompt)
    mean = torch.cat([mean, mean[:1].expand(len(found.sizes) - len(mean))])
    return found.ratio(found.own[:, member], mean)


def without_each(x: Tensor, prompt: Tensor) -> Tensor:
    """(1 + C,) the mean of x (B,) over all sequences, and over those without each prompt's."""
    group, x = prompt.unique(return_inverse=True)[1].cpu(), x.double().cpu()
    part, ones = x.new_zeros(2, int(group.max()) + 1), torch.stack([x, torch.ones_like(x)])
    part.index_add_(1, group, ones)
    whole = part.sum(1, keepdim=True)
    total, count = torch.cat([whole, whole - part], 1)
    return total / count


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The member of least mean squared error for `sequences` a batch, grouped as measured.

    name, gamma; error (F,) |bias|^2 + noise / sequences of all; share (F,) how often each one is
    the best under the sampling error of this measurement. A small share of the winner says that
    several do as well as far as this batch can tell.
    """

    name: str
    gamma: float
    error: Tensor
    share: Tensor


def recommend(
    found: Pairs, at: Grid, sequences: int, generator: torch.Generator, draws: int = 2000
) -> Choice:
    """Least |bias|^2 + noise / sequences over the family; negative |bias|^2 counts as 0.

    The criterion is one step's squared error as an estimate of the gradient of the sequence KL, not
    what training ends at. The share is found by normal draws with the jackknife's covariance of
    all biases and noises together; draws on common prompts, so that what moves all members alike
    does not count. Of members that are the same at a discount, as some are at 0, the first counts.

    Raises:
      ValueError: sequences is not positive.
      Missing: bias could not be measured.
    """
    if sequences < 1:
        raise InvalidInput(f"sequences is {sequences}; an update needs at least 1")
    c, cut = found.num_prompts, len(at.gammas)
    both = torch.cat([squared_bias(found, at), found.noise], 1)[: 1 + c].cpu()
    away = both[1:] - both[1:].mean(0)
    normal = torch.randn(draws, c, generator=generator, dtype=both.dtype)
    drawn = torch.cat([both[:1], both[0] + ((c - 1) / c) ** 0.5 * normal @ away])
    error = drawn[:, :cut].clamp(min=0).repeat(1, len(at.names)) + drawn[:, cut:] / sequences
    least = error.amin(1, keepdim=True)
    winners = (error <= least + 1e-5 * least.abs()).long().argmax(1)  # the first of equals
    best = int(winners[0])
    return Choice(
        name=at.names[best // cut],
        gamma=at.gammas[best % cut],
        error=error[0],
        share=torch.bincount(winners[1:], minlength=error.shape[1]).double() / draws,
    )


def cost_of_response(batch: ScoredRollouts) -> Tensor:
    """(B,) KL summed over a response; its mean is kappa T, which with n places a run on the plane.

    Sums of K where the batch has prefix functionals, else of the sampled r, of the same mean.
    """
    cost = batch.log_ratio if batch.prefix is None else batch.prefix.reverse_kl
    return (cost.double() * batch.mask).sum(1)
