"""Accumulators of second moments: covariances, explained variance, z, effective sample sizes.

Shapes: B responses, T positions, S position slices (`diagnostics.core.position_bins`), R rungs.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.cluster_sums import apply_mask
from diagnostics.core.position_bins import LABELS, NUM_BINS, bin_membership, extents
from diagnostics.core.totals import Accumulator

_STEP = 256.0
_RUNGS = 160
_FIRST = -40


@dataclass(frozen=True, eq=False)
class Covariance(Accumulator):
    """Covariance of x and y over the masked entries; every field is 0-d.

    Computed values: "_cov" = sum (x - mean x)(y - mean y) / (n - 1), "_corr" = the correlation
    coefficient; NaN with fewer than two entries, the coefficient also where x or y is constant.
    The sums are not centred: keep the means within about 10^5 standard deviations of 0.
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def from_values(cls, x: Tensor, y: Tensor, mask: Tensor) -> Self:
        """Accumulate one batch.

        Args:
            x: Values of any shape.
            y: Values of the same shape.
            mask: Bool, of the same shape.

        Returns:
            The accumulator of the masked entries.
        """
        x, y = apply_mask(x, mask), apply_mask(y, mask)
        sums = (mask.double(), x, y, x * x, y * y, x * y)
        return cls(*(v.sum() for v in sums))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute covariance and correlation from the host sums."""
        n, x, y, xx, yy, xy = (float(v) for v in sums)
        if n < 2:
            return {"_cov": float("nan"), "_corr": float("nan")}
        sxx, syy, sxy = xx - x * x / n, yy - y * y / n, xy - x * y / n
        is_varying = min(sxx / max(xx, 1e-300), syy / max(yy, 1e-300)) > 1e-14
        corr = sxy / (sxx * syy) ** 0.5 if is_varying else float("nan")
        return {"_cov": sxy / (n - 1), "_corr": corr}


@dataclass(frozen=True, eq=False)
class WithinPrefixVariance(Accumulator):
    """Share of the variance of x that remains when the prefix is fixed; every field is 0-d.

    Computed value: "" = sum m v / sum m (x - mean x)^2 with v = Var(x | prefix), NaN where x is
    constant. Numerator and denominator are estimated separately, so the share may exceed 1 by
    sampling noise.
    """

    within: Tensor
    total: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def from_values(cls, x: Tensor, variance: Tensor, mask: Tensor) -> Self:
        """Accumulate one batch.

        Args:
            x: (B, T) values.
            variance: (B, T) Var(x | prefix).
            mask: (B, T) bool.

        Returns:
            The accumulator of the masked entries.
        """
        x = apply_mask(x, mask)
        return cls(apply_mask(variance, mask).sum(), x.sum(), x.square().sum(), mask.double().sum())

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute the share from the host sums."""
        within, total, square, count = (float(v) for v in sums)
        spread = square - total**2 / count if count else 0.0
        return {"": within / spread if spread > 1e-14 * square else float("nan")}


@dataclass(frozen=True, eq=False)
class EffectiveSampleSize(Accumulator):
    """Effective share of samples under weights w = exp(l): (sum w)^2 / (n sum w^2), in (0, 1].

    Computed values: "" over all samples and "@lo-hi" for each bin that some response completes; NaN
    where n is 0. 1 means equal weights, 1/n that one sample carries all the weight. Fields (S, R):
    sums of w, w^2 and 1 on a ladder of scales, each sample on the rung next above its own l, so
    that sums of e^-5000 and e^5000 add exactly and never under- or overflow. l is clamped to
    [-10240, 30719].
    """

    weight: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def from_values(cls, log_weight: Tensor, mask: Tensor) -> Self:
        """Accumulate all masked entries, of any shape."""
        return cls(*_rung_sums(log_weight.flatten()[None], mask.flatten()[None]))

    @classmethod
    def from_prefixes(cls, log_weight: Tensor, mask: Tensor) -> Self:
        """Accumulate prefix weights: l at position t is the masked sum of log_weight up to t.

        Slice 0 takes each response at its end. A bin takes the responses that reach its last
        position, at that position.

        Args:
            log_weight: (B, T) log-weight of each token.
            mask: (B, T) bool.

        Returns:
            The accumulator, with fields (S, R).
        """
        cumulative_log_weight = apply_mask(log_weight, mask).cumsum(1)
        last_position = extents(mask)
        ends = 2 ** torch.arange(1, NUM_BINS + 1, device=mask.device)
        stop = torch.cat([last_position[:, None], ends.expand(len(mask), -1)], 1)
        used = (stop <= last_position[:, None]) & (last_position > 0)[:, None]
        positions = (stop - 1).clamp(min=0, max=mask.shape[1] - 1)
        return cls(*_rung_sums(cumulative_log_weight.gather(1, positions).T, used.T))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute the effective shares from the host sums."""
        scale = _STEP * (np.arange(_RUNGS) + _FIRST + 1)
        shares = {}
        for label, weight, square, count in zip(LABELS, *sums, strict=False):
            n, used = count.sum(), count > 0
            if n == 0:
                if not label:
                    shares[label] = float("nan")
                continue
            first = np.logaddexp.reduce(np.log(weight[used]) + scale[used])
            second = np.logaddexp.reduce(np.log(square[used]) + 2 * scale[used])
            shares[label] = float(np.exp(2 * first - second) / n)
        return shares


@dataclass(frozen=True, eq=False)
class Martingale(Accumulator):
    """z = sum m d / sqrt(sum m v) for differences d with mean 0 and variance v given the prefix.

    Computed values: "" z over the whole response and "@lo-hi" over each bin with nonzero variance,
    each approximately standard normal if the differences really have mean 0 (martingale central
    limit theorem); under a fixed bias it grows like the square root of the number of tokens. Both
    fields are (S,).
    """

    difference: Tensor
    variance: Tensor

    @classmethod
    def from_values(cls, difference: Tensor, variance: Tensor, mask: Tensor) -> Self:
        """Accumulate one batch.

        Args:
            difference: (B, T) martingale differences.
            variance: (B, T) their conditional variances.
            mask: (B, T) bool.

        Returns:
            The accumulator.
        """
        membership = bin_membership(mask.shape[1], mask.device)
        return cls(*(apply_mask(x, mask).sum(0) @ membership for x in (difference, variance)))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute z from the host sums."""
        z_scores = {"": float("nan")}
        for label, difference, variance in zip(LABELS, *(x.tolist() for x in sums), strict=True):
            if variance > 0:
                z_scores[label] = difference / variance**0.5
        return z_scores


def _rung_sums(log_weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum w / top, (w / top)^2 and 1 by rung, with top the next scale: (S, n) to (S, R)."""
    clamped_log_weight = apply_mask(log_weight, mask).clamp(
        _STEP * _FIRST, _STEP * (_FIRST + _RUNGS) - 1
    )
    rung = (clamped_log_weight / _STEP).floor()
    scaled_log_weight = clamped_log_weight - _STEP * (rung + 1)
    rung_index = rung.long() - _FIRST
    empty = clamped_log_weight.new_zeros(len(clamped_log_weight), _RUNGS)
    scaled_weight = scaled_log_weight.exp() * mask
    sums = (scaled_weight, scaled_weight.square(), mask.double())
    return tuple(empty.scatter_add(1, rung_index, x) for x in sums)  # type: ignore[return-value]
