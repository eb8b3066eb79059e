"""Noise of the sampled-token gradient at a prefix, computed without a backward pass (E-5, E-6).

The gradient of a token with respect to its logits is (r - b) (one_hot(y) - p), y drawn from p. Its
mean and variance over y are sums over the vocabulary. Shapes: B responses, T positions; with K =
sum p l, M2 = sum p l^2, N1 = sum p^2 l, N2 = sum p^2 l^2, c = sum p^2, l = log p - log q.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.optional_fields import MissingField, require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean, PositionMean

ENTROPY_THRESHOLD = 1.0
"""Student entropy in nats above which a token is undecided."""


@dataclass(frozen=True, eq=False)
class TokenNoise:
    """Squared mean and variance of each token's gradient under three baselines; (B, T) each.

    The noise as a function of b is the parabola zero - 2 b slope + b^2 curve.
    """

    signal: Tensor
    """|mean|^2 of the gradient."""
    zero: Tensor
    """Noise with b = 0."""
    value: Tensor
    """Noise with b = K."""
    best: Tensor
    """Noise with b = b*."""
    slope: Tensor
    """Linear coefficient of the parabola."""
    curve: Tensor
    """Quadratic coefficient of the parabola."""


def prefix_noise(prefix: DistributionStats) -> TokenNoise:
    """Compute signal and noise of each token's gradient with respect to its logits, in float64.

    signal = N2 - 2 K N1 + K^2 c; noise(b) = (1 + c) M2 - 2 N2 - signal
      - 2 b ((1 + c) K - 2 N1) + b^2 (1 - c); b* = ((1 + c) K - 2 N1) / (1 - c), the least noise.
        Where the student is certain (1 - c below 1e-6) there is hardly any noise and K replaces b*.

    Args:
        prefix: Distribution stats of the batch, (B, T) each.

    Returns:
        The noise at every token.

    Raises:
        MissingField: The stats were saved before N1 and N2 were stored.
    """
    if prefix.square_ratio is None or prefix.square_ratio_square is None:
        raise MissingField(
            "the distribution stats lack sum p^2 l and sum p^2 l^2; score the batch again"
        )
    k, m2, c = (x.double() for x in (prefix.reverse_kl, prefix.ratio_square, prefix.collision))
    n1, n2 = prefix.square_ratio.double(), prefix.square_ratio_square.double()
    signal = (n2 - 2 * k * n1 + k * k * c).clamp(min=0)
    slope, curve = (1 + c) * k - 2 * n1, (1 - c).clamp(min=0)
    certain = curve < 1e-6
    best = torch.where(certain, k, slope / torch.where(certain, 1.0, curve))

    def noise(b: Tensor) -> Tensor:
        return ((1 + c) * m2 - 2 * n2 - signal - 2 * b * slope + b * b * curve).clamp(min=0)

    return TokenNoise(signal, noise(torch.zeros_like(k)), noise(k), noise(best), slope, curve)


def gradient_noise(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """E-5: Compute signal and noise of the sampled-token gradient at a prefix, in logit space.

    With g = r (one_hot(y) - p).

    Access: L2 with sum p^2 l and sum p^2 l^2.
    Source: derived.
    Healthy: 0.05 to 0.1 for peaked distributions: at least nine tenths of a token's gradient is
    sampling noise that a full-vocabulary or top-K loss would not have. The ratio does not fall
    merely because the student approaches the teacher: signal and noise both shrink as the square of
    the gap.

    Args:
        batch: Scored rollouts.

    Returns:
        noise/token_signal: Mean |E g|^2.
        noise/token_noise: Mean tr Var g.
        noise/signal_to_noise: Ratio of their sums.
        noise/signal_to_noise_decided: The same over tokens with student entropy up to 1 nat.
        noise/signal_to_noise_undecided: The same over tokens with student entropy above 1 nat.
    """
    prefix = require_distribution_stats(batch)
    noise, mask, prompt = prefix_noise(prefix), batch.mask, batch.prompt
    undecided = prefix.student_entropy > ENTROPY_THRESHOLD
    groups = {"": mask, "_decided": mask & ~undecided, "_undecided": mask & undecided}
    return {
        "noise/token_signal": PositionMean.from_values(noise.signal, mask, prompt),
        "noise/token_noise": PositionMean.from_values(noise.zero, mask, prompt),
        **{
            f"noise/signal_to_noise{name}": Mean.ratio(noise.signal, noise.zero, group_mask, prompt)
            for name, group_mask in groups.items()
        },
    }


def baseline_noise(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """E-6: Compute the reduction of the token noise by a baseline at the prefix: K or the best.

    Access: L2 with sum p^2 l and sum p^2 l^2.
    Source: derived; 2605.07865 subtracts K.
    Healthy: best_noise_ratio is at most 1 and at most value_noise_ratio, always. A
    value_noise_ratio near 1 means that K, an estimate of the mean and not of the best baseline,
    does not help here.

    Args:
        batch: Scored rollouts.

    Returns:
        noise/value_noise_ratio: sum noise(K) / sum noise(0).
        noise/best_noise_ratio: The same with b*.
        noise/value_worse_share: Share of tokens where noise(K) > noise(0).
        noise/best_constant: The constant that leaves the least noise when it is subtracted from
            every token's cost, nats; compare it with k1.
    """
    noise, mask, prompt = prefix_noise(require_distribution_stats(batch)), batch.mask, batch.prompt
    return {
        "noise/value_noise_ratio": Mean.ratio(noise.value, noise.zero, mask, prompt),
        "noise/best_noise_ratio": Mean.ratio(noise.best, noise.zero, mask, prompt),
        "noise/value_worse_share": Mean.from_values(noise.value > noise.zero, mask, prompt),
        "noise/best_constant": Mean.ratio(noise.slope, noise.curve, mask, prompt),
    }
