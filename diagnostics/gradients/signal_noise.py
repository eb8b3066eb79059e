"""Signal and noise of a gradient (E-1), from one vector a sequence, at a fixed policy.

Everything rests on mean inner products of two kinds of pairs. Sequences of *different* prompts are
independent, so that E<x_i, y_j> = <E x, E y>: squared lengths without the noise that |mean|^2
carries. Sequences of one prompt share what is peculiar to it. The prompt is the sampling unit: each
statistic is computed once on all and once without each prompt (the jackknife), and where vectors
are sketches, once without each of their independent copies, which measures the sketch's own error.

Shapes: n sequences, C prompts, F vectors a sequence (members of a family), J independent copies of
a sketch, m numbers a copy; R = 1 + C + J replicates, or 1 + C if J = 1: whole, without a prompt,
without a copy. Gradients are sums over the tokens of a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput
from diagnostics.gradients.jackknife import Estimate, estimate, positive, ratio, squared


def pairs(x: Tensor, prompt: Tensor) -> "Pairs":
    """Mean inner products of x (n, F, J, m), each copy unbiased once multiplied by sqrt(J).

    prompt: (n,) ids. Exact gradients have J = 1. Cost: n F m + C F^2 m for each copy, float64
    on the device of x; what is kept moves to the host.

    Raises:
      Missing: fewer than 3 prompts, which leaves the jackknife nothing to compare.
      ValueError: x is not (n, F, J, m).
    """
    if x.dim() != 4 or len(x) != len(prompt):
        raise InvalidInput(f"x has shape {tuple(x.shape)}, expected ({len(prompt)}, F, J, m)")
    group = prompt.unique(return_inverse=True)[1]
    count = torch.bincount(group.cpu()).double()
    if len(count) < 3:
        raise MissingField(f"the batch has {len(count)} prompts; a jackknife needs at least 3")
    copies = x.shape[2]
    sums = [_sums(x[:, :, j].double() * copies**0.5, group, len(count)) for j in range(copies)]
    apart, same, own, whole = (
        torch.stack(s).cpu() for s in zip(*sums, strict=True)
    )  # (J, 1 + C, ...)
    size = torch.cat([count.new_zeros(1), count])
    n, square = count.sum() - size, count.square().sum() - size.square()
    return Pairs(
        apart=_over_copies(apart / (n.square() - square)[:, None, None]),
        same=_over_copies(same / (square - n)[:, None]),
        own=_over_copies(own / n[:, None]),
        whole=_over_copies(whole / n.square()[:, None]),
        sizes=n[torch.tensor([*range(len(n)), *[0] * (copies if copies > 1 else 0)])],
        num_prompts=len(count),
    )


def _sums(x: Tensor, group: Tensor, num_prompts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of inner products over pairs, on all and without each prompt; x (n, F, m)."""
    part = x.new_zeros(num_prompts, *x.shape[1:]).index_add_(0, group, x)
    total = part.sum(0)
    inside = part @ part.mT  # (C, F, F)
    across = part @ total.T
    square = x.new_zeros(num_prompts, x.shape[1]).index_add_(0, group, x.square().sum(-1))

    everything = total @ total.T
    apart = everything - inside.sum(0)
    apart_without = apart - across - across.mT + 2 * inside
    length = inside.diagonal(dim1=1, dim2=2)  # (C, F) |sum of the prompt|^2
    whole_without = everything.diagonal() - 2 * across.diagonal(dim1=1, dim2=2) + length
    return (
        torch.cat([apart[None], apart_without]),
        _without(length - square),
        _without(square),
        torch.cat([everything.diagonal()[None], whole_without]),
    )


def _without(x: Tensor) -> Tensor:
    """(C, ...) -> (1 + C, ...): the sum, and the sum without each."""
    return torch.cat([x.sum(0)[None], x.sum(0) - x])


def _over_copies(x: Tensor) -> Tensor:
    """(J, 1 + C, ...) -> (R, ...): mean over copies, and of the whole without each copy."""
    if len(x) == 1:
        return x[0]
    rest = (x[:, 0].sum(0) - x[:, 0]) / (len(x) - 1)
    return torch.cat([x.mean(0), rest])


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Mean inner products, replicates first.

    apart (R, F, F): of sequences of different prompts, unbiased for <E x, E y>; same (R, F): of
    different sequences of one prompt, NaN where no prompt has two; own (R, F): of a sequence with
    itself; whole (R, F): |mean over the batch|^2; sizes (R,) sequences.
    """

    apart: Tensor
    same: Tensor
    own: Tensor
    whole: Tensor
    sizes: Tensor
    num_prompts: int

    @property
    def signal(self) -> Tensor:
        """(R, F) |G|^2 of G = E g."""
        return self.apart.diagonal(dim1=1, dim2=2)

    @property
    def variance(self) -> Tensor:
        """(R, F) tr Cov of one sequence of a random prompt."""
        return self.own - self.signal

    @property
    def within(self) -> Tensor:
        """(R, F) the part of `variance` between rollouts of one prompt."""
        return self.own - self.same

    @property
    def between(self) -> Tensor:
        """(R, F) the part of `variance` that differs from prompt to prompt."""
        return self.same - self.signal

    @property
    def noise(self) -> Tensor:
        """(R, F) n times the variance of the batch's mean, at the batch's rollouts a prompt.

        With k rollouts of each prompt, k between + within; `variance` if k = 1.
        """
        return self.sizes[:, None] * (self.whole - self.signal)

    def estimate(self, replicates: Tensor) -> Estimate:
        return estimate(replicates, self.num_prompts)

    def positive(self, replicates: Tensor) -> Estimate:
        return positive(replicates, self.num_prompts)

    def ratio(self, above: Tensor, below: Tensor) -> Estimate:
        return ratio(above, below, self.num_prompts)


# --- E-1 ------------------------------------------------------------------------------------------


def signal_and_noise(x: Tensor, prompt: Tensor) -> dict[str, Estimate]:
    """E-1 of one gradient a sequence: x (n, m) exact or (n, J, m) sketched, prompt (n,).

    - signal = |G|^2, G = E g; variance = tr Cov(g), of which between prompts and within a prompt;
    - snr = |G|^2 / Var(mean of this batch), of this many sequences and rollouts a prompt;
    - noise_scale = sequences, grouped as here, at which that is 1 (B_simple of 1812.06162);
      NaN where |G|^2 is not distinguishable from 0.
    Access: G. Healthy: snr above 1; noise_scale far above the batch means that an update is mostly
    noise. On-policy distillation has no noise at its optimum, so that a *falling* snr at a KL that
    is still large is a symptom.

    Raises:
      Missing: fewer than 3 prompts.
    """
    found = pairs(x.unsqueeze(1) if x.dim() == 3 else x[:, None, None], prompt)
    return measures(found, 0)


def measures(found: Pairs, member: int) -> dict[str, Estimate]:
    """`signal_and_noise` of one member of a family."""
    signal, noise = found.signal[:, member], found.noise[:, member]
    n = found.sizes[0]
    return {
        "signal": squared(found.estimate(signal)),
        "variance": found.positive(found.variance[:, member]),
        "between": found.estimate(found.between[:, member]),
        "within": found.positive(found.within[:, member]),
        "snr": found.ratio(n * signal, noise),
        "noise_scale": found.ratio(noise, signal),
    }


def from_norms(batch_square: float, sequence_squares: Tensor) -> tuple[float, float]:
    """(|G|^2, tr Cov) from norms alone: |sum_i g_i|^2 and |g_i|^2 (n,) of independent sequences.

    |G|^2 = (|sum g|^2 - sum |g|^2) / (n (n - 1)), tr Cov = (sum |g|^2 - |sum g|^2 / n) / (n - 1).
    Unbiased; |G|^2 may come out negative, then do not divide by it. Rollouts of one prompt are not
    independent: give the norms of the prompts' means, which makes the prompt the unit of both.

    Raises:
      ValueError: fewer than 2 sequences.
    """
    n, squares = len(sequence_squares), float(sequence_squares.double().sum())
    if n < 2:
        raise InvalidInput(f"{n} sequence; the noise of one cannot be seen, give at least 2")
    return (batch_square - squares) / (n * (n - 1)), (squares - batch_square / n) / (n - 1)


def from_batches(
    large_square: float, large: int, small_square: float, small: int
) -> tuple[float, float]:
    """(|G|^2, tr Cov of a sequence) from squared norms of *mean* gradients of two batch sizes.

    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b), tr Cov = (|G_b|^2 - |G_B|^2) / (1/b - 1/B).
    For data-parallel training: b sequences a rank, B all. Average the two squared norms over ranks
    and steps before this. (1812.06162, appendix A.)

    Raises:
      ValueError: large is not larger than small, or small not positive.
    """
    if not large > small > 0:
        raise InvalidInput(f"batches of {large} and {small} sequences; need large > small > 0")
    signal = (large * large_square - small * small_square) / (large - small)
    return signal, (small_square - large_square) / (1 / small - 1 / large)
