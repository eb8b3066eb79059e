"""Accumulators that are histograms with fixed log-spaced levels: concentration and quantiles.

Levels never depend on the data, so histograms of micro-batches, ranks and steps can be added. A
level is 2^(1/8), 9 %, wide. Shapes: B responses, T positions, S position slices
(`diagnostics.core.position_bins`).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.cluster_sums import apply_mask
from diagnostics.core.position_bins import LABELS, NUM_BINS, bin_indices
from diagnostics.core.totals import Accumulator

_PER_OCTAVE = 8
_LOWEST, _HIGHEST = -40, 10
NUM_LEVELS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2
_FLOOR, _CEILING = -20, 20
_SIDE = (_CEILING - _FLOOR) * _PER_OCTAVE
PERCENTS = (1, 5, 25, 50, 75, 95, 99)
IN_BINS = (5, 50, 95)


@dataclass(frozen=True, eq=False)
class Concentration(Accumulator):
    """How unequally nonnegative x is distributed over N masked tokens.

    Computed values, NaN when sum x is 0:
    - "_n_eff" = (sum x)^2 / sum x^2, the number of equal tokens with the same total; exact;
    - "_n_eff_share" = n_eff / N in (0, 1]; exact;
    - "_entropy_n_eff" = exp(log sum x - sum x log x / sum x), the same by entropy; never below
      n_eff and less sensitive to a single huge token; exact;
    - "_top1_share", share of sum x in the N/100 largest tokens (a fractional number of
      tokens, so 0.01 when all are equal, whatever N);
    - "_gini" = sum_j (2j - N - 1) x_(j) / (N sum x), ascending ranks.

    "_top1_share" and "_gini" come from a histogram of fixed log-spaced levels, eight per octave
    between 2^-40 and 2^10, with counts and sums: tokens of one level count as equal to their mean,
    and the level that contains the 99th percentile contributes its tokens at that mean. Levels are
    9 % wide, which bounds the relative error of that level's part of "_top1_share"; "_gini" is
    never too large, and too small by less than 0.022. All x below 2^-40 share one level, as do all
    x from 2^10 on.
    """

    total: Tensor
    square: Tensor
    log_total: Tensor
    count: Tensor
    level_count: Tensor
    level_total: Tensor

    @classmethod
    def from_values(cls, x: Tensor, mask: Tensor) -> Self:
        """Accumulate one batch.

        Args:
            x: (B, T) nonnegative values.
            mask: (B, T) bool.

        Returns:
            The accumulator of the masked values.
        """
        x, weight = apply_mask(x, mask).flatten(), mask.double().flatten()
        octave = torch.where(x > 0, x.log2(), torch.full_like(x, _LOWEST - 1))
        level = ((octave - _LOWEST) * _PER_OCTAVE).floor().clamp(-1, NUM_LEVELS - 2).long() + 1
        empty = x.new_zeros(NUM_LEVELS)
        return cls(
            x.sum(),
            x.square().sum(),
            torch.xlogy(x, x).sum(),
            weight.sum(),
            empty.index_add(0, level, weight),
            empty.index_add(0, level, x),
        )

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute the values from the host sums, in field order."""
        total, square, log_total, count, counts, totals = sums
        if not total > 0:
            names = ("_n_eff", "_n_eff_share", "_entropy_n_eff", "_top1_share", "_gini")
            return dict.fromkeys(names, float("nan"))
        totals_below = np.cumsum(totals) - totals
        counts_above = counts.sum() - np.cumsum(counts)
        top_counts = np.clip(count / 100 - counts_above, 0, counts)
        mean = totals / np.maximum(counts, 1)
        return {
            "_n_eff": float(total**2 / square),
            "_n_eff_share": float(total**2 / square / count),
            "_entropy_n_eff": float(total * np.exp(-log_total / total)),
            "_top1_share": float((top_counts * mean).sum() / total),
            "_gini": float(1 - (counts * (2 * totals_below + totals)).sum() / (count * total)),
        }

    def lorenz(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the points of the Lorenz curve.

        The curve is exact at these points and too high between them by at most the spread within
        one level. NaN when sum x is 0. One host sync.

        Returns:
            Share of the tokens, smallest first, and share of sum x that they hold; (L + 1,) each,
            from (0, 0) to (1, 1), where L is the number of levels.
        """
        counts, totals = (x.cpu().numpy() for x in (self.level_count, self.level_total))
        with np.errstate(divide="ignore", invalid="ignore"):
            curves = [np.concatenate([[0.0], np.cumsum(x)]) / x.sum() for x in (counts, totals)]
        return curves[0], curves[1]


@dataclass(frozen=True, eq=False)
class Quantiles(Accumulator):
    """Quantiles of signed x over masked tokens, overall and by position bin; fields (S, L).

    Computed values: the PERCENTS "_q1" ... "_q99" over all tokens, and for each non-empty bin those
    of IN_BINS, "_q5@lo-hi", ... A quantile is the least x that at least that percentage of tokens
    does not exceed (inverse of the empirical distribution), to the resolution of a level: the value
    is the mean of the level that contains the quantile, off by less than 9.1 %, and exact where a
    level holds one value only. |x| below 2^-20 forms one level about 0, |x| from 2^20 one on each
    side.
    """

    level_count: Tensor
    level_total: Tensor

    @classmethod
    def from_values(cls, x: Tensor, mask: Tensor) -> Self:
        """Accumulate one batch.

        Args:
            x: (B, T) values by position, or (B,) values without positions (then S = 1).
            mask: Bool, of the same shape.

        Returns:
            The accumulator of the masked values.
        """
        by_position = x.dim() == 2
        value, weight = apply_mask(x, mask), mask.double()
        octave = value.abs().clamp(min=2.0 ** (_FLOOR - 1)).log2()
        size = ((octave - _FLOOR) * _PER_OCTAVE).floor().clamp(-1, _SIDE - 1).long() + 1
        level = _SIDE + value.sign().long() * size
        width = 2 * _SIDE + 1
        if by_position:
            level = level + width * bin_indices(x.shape[1], x.device)
        empty = value.new_zeros((NUM_BINS if by_position else 1) * width)
        sums = [
            empty.index_add(0, level.flatten(), v.flatten()).view(-1, width)
            for v in (weight, value)
        ]
        if by_position:
            sums = [torch.cat([v.sum(0, keepdim=True), v]) for v in sums]
        return cls(*sums)

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute the quantiles from the host counts and sums."""
        quantiles = {}
        for label, counts, totals in zip(LABELS, *sums, strict=False):
            count = counts.sum()
            if label and count == 0:
                continue
            cumulative_counts = np.cumsum(counts)
            for percent in IN_BINS if label else PERCENTS:
                index = min(
                    int(np.searchsorted(cumulative_counts, percent * count / 100)), len(counts) - 1
                )
                value = totals[index] / counts[index] if count else float("nan")
                quantiles[f"_q{percent}{label}"] = float(value)
        return quantiles
