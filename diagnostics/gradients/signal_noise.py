"""Signal and noise of a gradient (E-1), from one vector a sequence, at a fixed policy.

Everything is computed from mean inner products of two kinds of pairs. Sequences of *different*
prompts are independent, so that E<x_i, y_j> = <E x, E y>: squared lengths without the noise that is
contained in |mean|^2. Sequences of one prompt share what is specific to the prompt. The prompt is
the sampling unit: each statistic is computed once on all prompts and once without each prompt (the
jackknife), and where vectors are sketches, once without each of their independent copies, which
measures the error of the sketch.

Shapes: n sequences, C prompts, F vectors a sequence (estimators of the family), J independent
copies of a sketch, m numbers a copy; R = 1 + C + J replicates, or 1 + C if J = 1: all, without a
prompt, without a copy. Gradients are sums over the tokens of a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput
from diagnostics.gradients.jackknife import (
    Estimate,
    mean_estimate,
    positive_estimate,
    ratio_estimate,
    squared_length_estimate,
)


def pair_products(x: Tensor, prompt: Tensor) -> "PairProducts":
    """Compute mean inner products of x, each copy unbiased once multiplied by sqrt(J).

    Cost: n F m + C F^2 m for each copy, float64 on the device of x; the results move to the host.

    Args:
        x: (n, F, J, m) gradients; exact gradients have J = 1.
        prompt: (n,) ids.

    Returns:
        The inner products with their replicates.

    Raises:
        MissingField: Fewer than 3 prompts, too few for the jackknife.
        InvalidInput: x is not (n, F, J, m).
    """
    if x.dim() != 4 or len(x) != len(prompt):
        raise InvalidInput(f"x has shape {tuple(x.shape)}, expected ({len(prompt)}, F, J, m)")
    group = prompt.unique(return_inverse=True)[1]
    count = torch.bincount(group.cpu()).double()
    if len(count) < 3:
        raise MissingField(f"the batch has {len(count)} prompts; the jackknife needs at least 3")
    num_copies = x.shape[2]
    sums = [
        _pair_sums(x[:, :, j].double() * num_copies**0.5, group, len(count))
        for j in range(num_copies)
    ]
    different_prompts, same_prompt, self_products, batch_mean_square = (
        torch.stack(s).cpu() for s in zip(*sums, strict=True)
    )  # (J, 1 + C, ...)
    size = torch.cat([count.new_zeros(1), count])
    num_sequences, square_sizes = count.sum() - size, count.square().sum() - size.square()
    return PairProducts(
        different_prompts=_add_copy_replicates(
            different_prompts / (num_sequences.square() - square_sizes)[:, None, None]
        ),
        same_prompt=_add_copy_replicates(same_prompt / (square_sizes - num_sequences)[:, None]),
        self_products=_add_copy_replicates(self_products / num_sequences[:, None]),
        batch_mean_square=_add_copy_replicates(batch_mean_square / num_sequences.square()[:, None]),
        sizes=num_sequences[
            torch.tensor([*range(len(num_sequences)), *[0] * (num_copies if num_copies > 1 else 0)])
        ],
        num_prompts=len(count),
    )


def _pair_sums(x: Tensor, group: Tensor, num_prompts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sums of inner products over pairs, on all and without each prompt; x (n, F, m)."""
    prompt_sums = x.new_zeros(num_prompts, *x.shape[1:]).index_add_(0, group, x)
    total = prompt_sums.sum(0)
    within_prompt = prompt_sums @ prompt_sums.mT  # (C, F, F)
    prompt_to_total = prompt_sums @ total.T
    square = x.new_zeros(num_prompts, x.shape[1]).index_add_(0, group, x.square().sum(-1))

    total_products = total @ total.T
    different_prompts = total_products - within_prompt.sum(0)
    different_prompts_without = (
        different_prompts - prompt_to_total - prompt_to_total.mT + 2 * within_prompt
    )
    prompt_squares = within_prompt.diagonal(dim1=1, dim2=2)  # (C, F) |sum of the prompt|^2
    total_without = (
        total_products.diagonal() - 2 * prompt_to_total.diagonal(dim1=1, dim2=2) + prompt_squares
    )
    return (
        torch.cat([different_prompts[None], different_prompts_without]),
        _leave_one_out_sums(prompt_squares - square),
        _leave_one_out_sums(square),
        torch.cat([total_products.diagonal()[None], total_without]),
    )


def _leave_one_out_sums(x: Tensor) -> Tensor:
    """Return the sum, and the sum without each: (C, ...) -> (1 + C, ...)."""
    return torch.cat([x.sum(0)[None], x.sum(0) - x])


def _add_copy_replicates(x: Tensor) -> Tensor:
    """Return the mean over copies, and the total without each copy: (J, 1 + C, ...) -> (R, ...)."""
    if len(x) == 1:
        return x[0]
    without_copy = (x[:, 0].sum(0) - x[:, 0]) / (len(x) - 1)
    return torch.cat([x.mean(0), without_copy])


@dataclass(frozen=True, kw_only=True, eq=False)
class PairProducts:
    """Mean inner products, replicates first."""

    different_prompts: Tensor
    """(R, F, F) of sequences of different prompts, unbiased for <E x, E y>."""
    same_prompt: Tensor
    """(R, F) of different sequences of one prompt, NaN where no prompt has two."""
    self_products: Tensor
    """(R, F) of a sequence with itself."""
    batch_mean_square: Tensor
    """(R, F) |mean over the batch|^2."""
    sizes: Tensor
    """(R,) number of sequences."""
    num_prompts: int
    """Number of prompts C."""

    @property
    def signal(self) -> Tensor:
        """(R, F) |G|^2 of G = E g."""
        return self.different_prompts.diagonal(dim1=1, dim2=2)

    @property
    def variance(self) -> Tensor:
        """(R, F) tr Cov of one sequence of a random prompt."""
        return self.self_products - self.signal

    @property
    def within(self) -> Tensor:
        """(R, F) the part of `variance` between rollouts of one prompt."""
        return self.self_products - self.same_prompt

    @property
    def between(self) -> Tensor:
        """(R, F) the part of `variance` that differs from prompt to prompt."""
        return self.same_prompt - self.signal

    @property
    def noise(self) -> Tensor:
        """(R, F) n times the variance of the batch's mean, at the batch's rollouts a prompt.

        With k rollouts of each prompt, k between + within; `variance` if k = 1.
        """
        return self.sizes[:, None] * (self.batch_mean_square - self.signal)

    def mean_estimate(self, replicates: Tensor) -> Estimate:
        """Return `jackknife.mean_estimate` of replicates (R,)."""
        return mean_estimate(replicates, self.num_prompts)

    def positive_estimate(self, replicates: Tensor) -> Estimate:
        """Return `jackknife.positive_estimate` of replicates (R,)."""
        return positive_estimate(replicates, self.num_prompts)

    def ratio_estimate(self, numerator: Tensor, denominator: Tensor) -> Estimate:
        """Return `jackknife.ratio_estimate` of replicates (R,)."""
        return ratio_estimate(numerator, denominator, self.num_prompts)


def signal_and_noise(gradients: Tensor, prompt: Tensor) -> dict[str, Estimate]:
    """E-1: Estimate signal, variance and noise scale of one gradient a sequence.

    Access: G.
    Healthy: snr above 1; a noise_scale far above the batch size means that an update is mostly
    noise. On-policy distillation has no noise at its optimum, so a *falling* snr at a KL that is
    still large is a symptom.

    Args:
        gradients: (n, m) exact or (n, J, m) sketched.
        prompt: (n,) ids.

    Returns:
        signal: |G|^2, G = E g.
        variance: tr Cov(g).
        between: The part of the variance between prompts.
        within: The part of the variance within a prompt.
        snr: |G|^2 / Var(mean of this batch), with this number of sequences and rollouts a prompt.
        noise_scale: Number of sequences, grouped as here, at which snr is 1 (B_simple of
            1812.06162); NaN where |G|^2 is not distinguishable from 0.

    Raises:
        MissingField: Fewer than 3 prompts.
    """
    products = pair_products(
        gradients.unsqueeze(1) if gradients.dim() == 3 else gradients[:, None, None], prompt
    )
    return signal_noise_estimates(products, 0)


def signal_noise_estimates(products: PairProducts, index: int) -> dict[str, Estimate]:
    """Return `signal_and_noise` of one estimator of a family."""
    signal, noise = products.signal[:, index], products.noise[:, index]
    num_sequences = products.sizes[0]
    return {
        "signal": squared_length_estimate(products.mean_estimate(signal)),
        "variance": products.positive_estimate(products.variance[:, index]),
        "between": products.mean_estimate(products.between[:, index]),
        "within": products.positive_estimate(products.within[:, index]),
        "snr": products.ratio_estimate(num_sequences * signal, noise),
        "noise_scale": products.ratio_estimate(noise, signal),
    }
