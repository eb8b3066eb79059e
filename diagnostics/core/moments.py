"""Totals of second moments: covariances, explained variance, effective sample sizes.

Shapes: B responses, T positions, S slices of position (`diagnostics.core.position_bins`), R rungs.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.position_bins import LABELS, NUM_BINS, extents
from diagnostics.core.totals import Accumulator, masked

_STEP = 256.0
_RUNGS = 160
_FIRST = -40


@dataclass(frozen=True, eq=False)
class Covariance(Accumulator):
    """Covariance of x and y over the masked entries; every field 0-d.

    Readout: "_cov" = sum (x - mean x)(y - mean y) / (n - 1), "_corr" = the correlation
    coefficient; NaN with fewer than two entries, the coefficient also where one does not vary.
    Sums are of x and y as they are: keep their means within 10^5 standard deviations or so.
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor) -> Self:
        """x, y, mask of one shape."""
        x, y = masked(x, mask), masked(y, mask)
        sums = (mask.double(), x, y, x * x, y * y, x * y)
        return cls(*(v.sum() for v in sums))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        n, x, y, xx, yy, xy = (float(v) for v in sums)
        if n < 2:
            return {"_cov": float("nan"), "_corr": float("nan")}
        sxx, syy, sxy = xx - x * x / n, yy - y * y / n, xy - x * y / n
        varied = min(sxx / max(xx, 1e-300), syy / max(yy, 1e-300)) > 1e-14
        corr = sxy / (sxx * syy) ** 0.5 if varied else float("nan")
        return {"_cov": sxy / (n - 1), "_corr": corr}


@dataclass(frozen=True, eq=False)
class Within(Accumulator):
    """Share of the variance of x that stays when the prefix is fixed; every field 0-d.

    Readout: "" = sum m v / sum m (x - mean x)^2 with v = Var(x | prefix), NaN where x is constant.
    Numerator and denominator are estimated apart, so the share may exceed 1 by sampling noise.
    """

    within: Tensor
    total: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def of(cls, x: Tensor, variance: Tensor, mask: Tensor) -> Self:
        """x, variance, mask: (B, T)."""
        x = masked(x, mask)
        return cls(masked(variance, mask).sum(), x.sum(), x.square().sum(), mask.double().sum())

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        within, total, square, count = (float(v) for v in sums)
        spread = square - total**2 / count if count else 0.0
        return {"": within / spread if spread > 1e-14 * square else float("nan")}


@dataclass(frozen=True, eq=False)
class EffectiveSize(Accumulator):
    """Effective share of samples under weights w = exp(l), (sum w)^2 / (n sum w^2), in (0, 1].

    Readout: "" over everything and "@lo-hi" for each bin that some response completes; NaN where
    n is 0. 1 means equal weights, 1/n that one sample carries everything. Fields (S, R): sums of
    w, w^2 and 1 on a ladder of scales, each sample on the rung next above its own l, so that sums
    of e^-5000 and e^5000 add exactly and never under- or overflow. l is held to [-10240, 30719].
    """

    weight: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def of(cls, log_weight: Tensor, mask: Tensor) -> Self:
        """Over all masked entries, of any shape."""
        return cls(*_ladder(log_weight.flatten()[None], mask.flatten()[None]))

    @classmethod
    def along(cls, log_weight: Tensor, mask: Tensor) -> Self:
        """Weights of whole prefixes: l of position t is the masked sum of log_weight up to t.

        Slice 0 takes responses at their ends. A bin takes responses that reach its last position,
        there: log_weight, mask (B, T).
        """
        along = masked(log_weight, mask).cumsum(1)
        reach = extents(mask)
        ends = 2 ** torch.arange(1, NUM_BINS + 1, device=mask.device)
        stop = torch.cat([reach[:, None], ends.expand(len(mask), -1)], 1)
        used = (stop <= reach[:, None]) & (reach > 0)[:, None]
        at = (stop - 1).clamp(min=0, max=mask.shape[1] - 1)
        return cls(*_ladder(along.gather(1, at).T, used.T))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        scale = _STEP * (np.arange(_RUNGS) + _FIRST + 1)
        found = {}
        for label, weight, square, count in zip(LABELS, *sums, strict=False):
            n, used = count.sum(), count > 0
            if n == 0:
                if not label:
                    found[label] = float("nan")
                continue
            first = np.logaddexp.reduce(np.log(weight[used]) + scale[used])
            second = np.logaddexp.reduce(np.log(square[used]) + 2 * scale[used])
            found[label] = float(np.exp(2 * first - second) / n)
        return found


def _ladder(log_weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S, R) sums of w / top, (w / top)^2 and 1 by rung, top the scale above; inputs (S, n)."""
    l = masked(log_weight, mask).clamp(_STEP * _FIRST, _STEP * (_FIRST + _RUNGS) - 1)
    rung = (l / _STEP).floor()
    below = l - _STEP * (rung + 1)
    at = rung.long() - _FIRST
    empty = l.new_zeros(len(l), _RUNGS)
    w = below.exp() * mask
    sums = (w, w.square(), mask.double())
    return tuple(empty.scatter_add(1, at, x) for x in sums)  # type: ignore[return-value]
