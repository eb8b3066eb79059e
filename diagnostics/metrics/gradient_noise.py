"""Noise of the sampled-token gradient at a prefix, without a gradient (E-5, E-6).

The gradient of a token with respect to its logits is (r - b) (one_hot(y) - p), y drawn from p. Its
mean and variance over y are sums over the vocabulary. Shapes: B responses, T positions; with
K = sum p l, M2 = sum p l^2, N1 = sum p^2 l, N2 = sum p^2 l^2, c = sum p^2, l = log p - log q.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.optional_fields import MissingField, prefix_of
from diagnostics.core.totals import Accumulator, Mean, PositionMean

UNDECIDED = 1.0


@dataclass(frozen=True, eq=False)
class Noise:
    """(B, T) each: |mean|^2 of the token's gradient and its variance under three baselines.

    zero, value, best: the noise with b = 0, K and b*. Its parabola is zero - 2 b slope + b^2 curve.
    """

    signal: Tensor
    zero: Tensor
    value: Tensor
    best: Tensor
    slope: Tensor
    curve: Tensor


def prefix_noise(prefix: DistributionStats) -> Noise:
    """Signal and noise of each token's gradient with respect to its logits, in float64.

    signal = N2 - 2 K N1 + K^2 c; noise(b) = (1 + c) M2 - 2 N2 - signal
      - 2 b ((1 + c) K - 2 N1) + b^2 (1 - c); b* = ((1 + c) K - 2 N1) / (1 - c), the least noise.
    Where the student is certain (1 - c below 1e-6) there is hardly noise and K stands for b*.

    Raises:
      Missing: the functionals were saved before N1 and N2 were kept.
    """
    if prefix.square_ratio is None or prefix.square_ratio_square is None:
        raise MissingField("the prefix functionals lack sum p^2 l and sum p^2 l^2 (score again)")
    k, m2, c = (x.double() for x in (prefix.reverse_kl, prefix.ratio_square, prefix.collision))
    n1, n2 = prefix.square_ratio.double(), prefix.square_ratio_square.double()
    signal = (n2 - 2 * k * n1 + k * k * c).clamp(min=0)
    slope, curve = (1 + c) * k - 2 * n1, (1 - c).clamp(min=0)
    certain = curve < 1e-6
    best = torch.where(certain, k, slope / torch.where(certain, 1.0, curve))

    def noise(b: Tensor) -> Tensor:
        return ((1 + c) * m2 - 2 * n2 - signal - 2 * b * slope + b * b * curve).clamp(min=0)

    return Noise(signal, noise(torch.zeros_like(k)), noise(k), noise(best), slope, curve)


def gradient_noise(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """E-5: signal and noise of the sampled-token gradient at a prefix, in the space of logits.

    token_signal = mean |E g|^2, token_noise = mean tr Var g of g = r (one_hot(y) - p);
    signal_to_noise = their ratio of sums, signal_to_noise_decided and _undecided the same over
    tokens with student entropy up to 1 nat and above.
    Access: L2 with sum p^2 l and sum p^2 l^2. Source: derived.
    Healthy: 0.05 to 0.1 for peaked distributions: nine tenths and more of a token's gradient is
    sampling noise that a full-vocabulary or top-K loss would not have. It does not fall merely
    because the student nears the teacher: signal and noise both shrink as the square of the gap.
    """
    prefix = prefix_of(batch)
    n, mask, prompt = prefix_noise(prefix), batch.mask, batch.prompt
    torn = prefix.student_entropy > UNDECIDED
    groups = {"": mask, "_decided": mask & ~torn, "_undecided": mask & torn}
    return {
        "noise/token_signal": PositionMean.of(n.signal, mask, prompt),
        "noise/token_noise": PositionMean.of(n.zero, mask, prompt),
        **{
            f"noise/signal_to_noise{name}": Mean.ratio(n.signal, n.zero, some, prompt)
            for name, some in groups.items()
        },
    }


def baseline_noise(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """E-6: what a baseline at the prefix saves of the token noise: the value K, or the best one.

    value_noise_ratio = sum noise(K) / sum noise(0); best_noise_ratio the same with b*;
    value_worse_share = share of tokens where noise(K) > noise(0); best_constant = the one number
    that subtracted from every token's cost leaves the least noise, nats, to hold against k1.
    Access: L2 with sum p^2 l and sum p^2 l^2. Source: derived; 2605.07865 subtracts K.
    Healthy: best at most 1 and at most value, always. A value ratio near 1 says that K, an estimate
    of the mean and not of the best baseline, buys nothing here.
    """
    n, mask, prompt = prefix_noise(prefix_of(batch)), batch.mask, batch.prompt
    return {
        "noise/value_noise_ratio": Mean.ratio(n.value, n.zero, mask, prompt),
        "noise/best_noise_ratio": Mean.ratio(n.best, n.zero, mask, prompt),
        "noise/value_worse_share": Mean.of(n.value > n.zero, mask, prompt),
        "noise/best_constant": Mean.ratio(n.slope, n.curve, mask, prompt),
    }
