"""Totals that are histograms of fixed log-spaced levels: concentration and quantiles, mergeable.

Levels never depend on the data, so histograms of micro-batches, ranks and steps add. A level is
2^(1/8), 9 %, wide. Shapes: B responses, T positions, S slices of position (`diagnostics.core.position_bins`).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.position_bins import LABELS, NUM_BINS, numbers
from diagnostics.core.totals import Accumulator, masked

_PER_OCTAVE = 8
_LOWEST, _HIGHEST = -40, 10
NUM_LEVELS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2
_FLOOR, _CEILING = -20, 20
_SIDE = (_CEILING - _FLOOR) * _PER_OCTAVE
PERCENTS = (1, 5, 25, 50, 75, 95, 99)
IN_BINS = (5, 50, 95)


@dataclass(frozen=True, eq=False)
class Concentration(Accumulator):
    """How unequally nonnegative x is spread over N masked tokens.

    Readout, NaN when sum x is 0:
    - "_n_eff" = (sum x)^2 / sum x^2, tokens that would carry the same if they were equal; exact;
    - "_n_eff_share" = n_eff / N in (0, 1]; exact;
    - "_entropy_n_eff" = exp(log sum x - sum x log x / sum x), the same by entropy, never below
      n_eff and less moved by a single huge token; exact;
    - "_top1_share", share of sum x held by the N/100 largest tokens (a fractional number of
      tokens, so 0.01 when all are equal, whatever N);
    - "_gini" = sum_j (2j - N - 1) x_(j) / (N sum x), ascending ranks.
    The last two come from a histogram of fixed log-spaced levels, eight an octave between 2^-40
    and 2^10, with counts and sums: tokens of one level count as equal to their mean, and the level
    that the 99th percentile cuts gives its tokens at that mean. Levels are 9 % wide, which bounds
    the relative error of the cut level's part; `gini` is never too large, and too small by less
    than 0.022. x below 2^-40 form one level, and so do x from 2^10.
    """

    total: Tensor
    square: Tensor
    log_total: Tensor
    count: Tensor
    level_count: Tensor
    level_total: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> Self:
        """x, mask: (B, T)."""
        x, weight = masked(x, mask).flatten(), mask.double().flatten()
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
        total, square, log_total, count, counts, totals = sums
        if not total > 0:
            names = ("_n_eff", "_n_eff_share", "_entropy_n_eff", "_top1_share", "_gini")
            return dict.fromkeys(names, float("nan"))
        below = np.cumsum(totals) - totals
        above = counts.sum() - np.cumsum(counts)
        taken = np.clip(count / 100 - above, 0, counts)
        mean = totals / np.maximum(counts, 1)
        return {
            "_n_eff": float(total**2 / square),
            "_n_eff_share": float(total**2 / square / count),
            "_entropy_n_eff": float(total * np.exp(-log_total / total)),
            "_top1_share": float((taken * mean).sum() / total),
            "_gini": float(1 - (counts * (2 * below + totals)).sum() / (count * total)),
        }

    def lorenz(self) -> tuple[np.ndarray, np.ndarray]:
        """Points of the Lorenz curve: share of the tokens, smallest first, and of sum x they hold.

        Each (L + 1,), from (0, 0) to (1, 1), L the levels; the curve is exact at these points and
        too high between them by what one level can hide. NaN when sum x is 0. One host sync.
        """
        counts, totals = (x.cpu().numpy() for x in (self.level_count, self.level_total))
        with np.errstate(divide="ignore", invalid="ignore"):
            both = [np.concatenate([[0.0], np.cumsum(x)]) / x.sum() for x in (counts, totals)]
        return both[0], both[1]


@dataclass(frozen=True, eq=False)
class Quantiles(Accumulator):
    """Quantiles of signed x over masked tokens, whole and by position bin; fields (S, L).

    Readout, in PERCENTS: "_q1" ... "_q99" of everything, and for each bin that holds tokens those
    in IN_BINS, "_q5@lo-hi", ...: the least x that at least so many percent do not exceed (inverse
    of the empirical distribution), to the resolution of a level: what is read out is the mean of
    the level that the quantile falls in, off by less than 9.1 % of it, and exact where a level
    holds one value only. |x| below 2^-20 forms one level about 0, |x| from 2^20 one each side.
    """

    level_count: Tensor
    level_total: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> Self:
        """x, mask: (B, T) by position, or (B,) as a whole (then S = 1)."""
        by_position = x.dim() == 2
        value, weight = masked(x, mask), mask.double()
        octave = value.abs().clamp(min=2.0 ** (_FLOOR - 1)).log2()
        size = ((octave - _FLOOR) * _PER_OCTAVE).floor().clamp(-1, _SIDE - 1).long() + 1
        level = _SIDE + value.sign().long() * size
        width = 2 * _SIDE + 1
        if by_position:
            level = level + width * numbers(x.shape[1], x.device)
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
        found = {}
        for label, counts, totals in zip(LABELS, *sums, strict=False):
            count = counts.sum()
            if label and count == 0:
                continue
            reached = np.cumsum(counts)
            for percent in IN_BINS if label else PERCENTS:
                at = min(int(np.searchsorted(reached, percent * count / 100)), len(counts) - 1)
                value = totals[at] / counts[at] if count else float("nan")
                found[f"_q{percent}{label}"] = float(value)
        return found
