"""Bias of truncating future costs (E-4), coherence (E-9), and the best estimator at a batch size.

The bias of a discount is E[g at gamma] - E[g at 1], measured as a vector on one low-noise
estimator. Its squared length is a difference of the unbiased inner products of
`diagnostics.gradients.signal_noise`, never the squared length of a mean: with 32 sequences that was
50 times too large in the study.

Shapes: B responses, T positions, G discounts, F = estimators * G, R replicates.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput
from diagnostics.gradients.estimators import EstimatorGrid, estimator_index
from diagnostics.gradients.jackknife import Estimate, squared_length_estimate
from diagnostics.gradients.signal_noise import PairProducts

REFERENCES = ("rb_all_position_mean", "rb_all", "position_mean", "plain")
"""Estimators with which bias is measured, least noise first."""


def reference_estimator(grid: EstimatorGrid) -> str:
    """Return the first of REFERENCES that was measured.

    Args:
        grid: Names and discounts of the estimators.

    Returns:
        Name of the estimator.

    Raises:
        MissingField: None was measured, or the discounts do not contain 0 and 1.
    """
    available = [name for name in REFERENCES if name in grid.names]
    if not available or not {0.0, 1.0} <= set(grid.gammas):
        raise MissingField(
            f"the bias requires one of {', '.join(REFERENCES)} at the discounts 0 and 1; "
            f"measured: {', '.join(grid.names)} at {list(grid.gammas)}"
        )
    return available[0]


def squared_bias(products: PairProducts, grid: EstimatorGrid) -> Tensor:
    """Return (R, G) |E g(gamma) - E g(1)|^2, unbiased, so possibly negative; 0 at gamma = 1."""
    name = reference_estimator(grid)
    indices = [estimator_index(grid, name, gamma) for gamma in grid.gammas]
    unbiased, inner = estimator_index(grid, name, 1.0), products.different_prompts
    square = (
        inner[:, indices, indices]
        - 2 * inner[:, indices, unbiased]
        + inner[:, unbiased, unbiased][:, None]
    )
    return square * square.new_tensor([gamma != 1 for gamma in grid.gammas])


def occupancy(products: PairProducts, grid: EstimatorGrid) -> dict[str, Estimate]:
    """E-4: Measure the part of the sequence-KL gradient that token-level distillation omits.

    With g = E[g at 0], which pulls the student to the teacher on the current prefixes, and h = E[g
    at 1] - g, which moves the student to other prefixes. The denominators are sums over a sequence,
    not its mean, for which g and h would differ.

    Access: G.
    Source: "Vanishing Learning Signals", whose median 1 + alpha lay between 0.1 and 1.1 with
    quartiles from -2.3 to 1.5: the value of a single checkpoint is uncertain, so read its interval.
    Healthy: near the teacher h is small compared with g. alpha below -1 means that the two oppose
    each other.

    Args:
        products: Inner products of the estimators' gradients.
        grid: Names and discounts of the estimators.

    Returns:
        alpha: <h, g> / |g|^2; 1 + alpha is the progress of a step along the full gradient relative
            to that of g alone.
        occupancy_square: |h|^2.
        bias_share: |h| / |g + h|.
        cosine: Cosine of g and g + h. Ratios and the cosine are NaN where a squared length in a
            denominator is not distinguishable from 0.
    """
    name = reference_estimator(grid)
    gamma_0, gamma_1, inner = (
        estimator_index(grid, name, 0.0),
        estimator_index(grid, name, 1.0),
        products.different_prompts,
    )
    local_square, full_square, inner_product = (
        inner[:, gamma_0, gamma_0],
        inner[:, gamma_1, gamma_1],
        inner[:, gamma_0, gamma_1],
    )
    occupancy_square = local_square - 2 * inner_product + full_square
    share = squared_length_estimate(products.ratio_estimate(occupancy_square, full_square))
    roots = {field: _clamped_sqrt(getattr(share, field)) for field in ("value", "low", "high")}
    derivative = 2 * roots["value"] if roots["value"] else math.nan  # chain rule of the square root
    alpha = products.ratio_estimate(inner_product - local_square, local_square)
    resolved = not (math.isnan(alpha.value) or math.isnan(share.value))
    norm_product = (
        (local_square * full_square).clamp(min=torch.finfo(local_square.dtype).tiny).sqrt()
    )
    cosine_gap = squared_length_estimate(
        products.ratio_estimate(
            norm_product - inner_product if resolved else inner_product * math.nan, norm_product
        )
    )
    return {
        "alpha": alpha,
        "occupancy_square": squared_length_estimate(products.mean_estimate(occupancy_square)),
        "bias_share": replace(
            share, **roots, error=share.error / derivative, sketch=share.sketch / derivative
        ),
        "cosine": replace(
            cosine_gap, value=1 - cosine_gap.value, low=1 - cosine_gap.high, high=1 - cosine_gap.low
        ),
    }


def _clamped_sqrt(x: float) -> float:
    return x if math.isnan(x) else math.sqrt(max(x, 0.0))


def coherence(products: PairProducts, energies: Tensor, prompt: Tensor, index: int) -> Estimate:
    """E-9: Estimate E|sum_t x_t|^2 / E sum_t |x_t|^2 of one estimator's token gradients x_t.

    1 where tokens of a sequence are orthogonal on average, far above 1 where they push in one
    direction (their number, if in exactly one), below 1 where they cancel. Scores times constants
    give 1: they are martingale differences.

    Access: G.
    Source: derived; tests the remark of 2604.13016 that anisotropic advantages cancel.

    Args:
        products: Inner products of the estimators' gradients.
        energies: (n, F) as `diagnostics.gradients.sketch.token_energies` returns them.
        prompt: (n,) ids.
        index: Index of the estimator in F.

    Returns:
        The ratio.
    """
    mean_energy = prompt_jackknife_means(energies[:, index], prompt)
    mean_energy = torch.cat(
        [mean_energy, mean_energy[:1].expand(len(products.sizes) - len(mean_energy))]
    )
    return products.ratio_estimate(products.self_products[:, index], mean_energy)


def prompt_jackknife_means(x: Tensor, prompt: Tensor) -> Tensor:
    """Return (1 + C,) means of x (B,) over all sequences, and without each prompt's sequences."""
    group, x = prompt.unique(return_inverse=True)[1].cpu(), x.double().cpu()
    prompt_sums, stacked = (
        x.new_zeros(2, int(group.max()) + 1),
        torch.stack([x, torch.ones_like(x)]),
    )
    prompt_sums.index_add_(1, group, stacked)
    totals = prompt_sums.sum(1, keepdim=True)
    sums, count = torch.cat([totals, totals - prompt_sums], 1)
    return sums / count


@dataclass(frozen=True, kw_only=True, eq=False)
class EstimatorChoice:
    """The estimator of least mean squared error for a batch size.

    For rollouts grouped as in the measured batch.
    """

    name: str
    """Name of the estimator."""
    gamma: float
    """Its discount."""
    error: Tensor
    """(F,) |bias|^2 + noise / sequences of all estimators."""
    share: Tensor
    """(F,) how often each estimator is the best under the sampling error of the measurement.

    A small share of the best one means that this batch cannot distinguish several estimators."""


def recommend_estimator(
    products: PairProducts,
    grid: EstimatorGrid,
    num_sequences: int,
    generator: torch.Generator,
    num_draws: int = 2000,
) -> EstimatorChoice:
    """Select the estimator with least |bias|^2 + noise / sequences; negative |bias|^2 counts as 0.

    The criterion is one step's squared error as an estimate of the gradient of the sequence KL, not
    the result of training. The share is computed from normal samples with the jackknife covariance
    of all biases and noises together; samples use common prompts, so that variation common to all
    estimators does not count. Of estimators that are equal at a discount, as some are at 0, the
    first counts.

    Args:
        products: Inner products of the estimators' gradients.
        grid: Names and discounts of the estimators.
        num_sequences: Sequences of an update.
        generator: Generator of the normal samples.
        num_draws: Number of samples.

    Returns:
        The choice.

    Raises:
        InvalidInput: `num_sequences` is not positive.
        MissingField: The bias could not be measured.
    """
    if num_sequences < 1:
        raise InvalidInput(f"num_sequences is {num_sequences}; it must be at least 1")
    num_prompts, num_gammas = products.num_prompts, len(grid.gammas)
    replicates = torch.cat([squared_bias(products, grid), products.noise], 1)[
        : 1 + num_prompts
    ].cpu()
    deviations = replicates[1:] - replicates[1:].mean(0)
    normal = torch.randn(num_draws, num_prompts, generator=generator, dtype=replicates.dtype)
    samples = torch.cat(
        [
            replicates[:1],
            replicates[0] + ((num_prompts - 1) / num_prompts) ** 0.5 * normal @ deviations,
        ]
    )
    error = (
        samples[:, :num_gammas].clamp(min=0).repeat(1, len(grid.names))
        + samples[:, num_gammas:] / num_sequences
    )
    min_error = error.amin(1, keepdim=True)
    winners = (error <= min_error + 1e-5 * min_error.abs()).long().argmax(1)  # the first of equals
    best = int(winners[0])
    return EstimatorChoice(
        name=grid.names[best // num_gammas],
        gamma=grid.gammas[best % num_gammas],
        error=error[0],
        share=torch.bincount(winners[1:], minlength=error.shape[1]).double() / num_draws,
    )


def response_cost(batch: ScoredRollouts) -> Tensor:
    """Return the (B,) KL summed over each response.

    Its mean is kappa T, which together with n places a run on the study's plane. Sums of K where
    the batch has distribution stats, otherwise of the sampled r, which has the same mean.

    Args:
        batch: Scored rollouts.

    Returns:
        (B,) float64, nats.
    """
    cost = batch.log_ratio if batch.prefix is None else batch.prefix.reverse_kl
    return (cost.double() * batch.mask).sum(1)
