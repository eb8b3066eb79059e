"""Means by tenth of the response.

Shapes: B responses, T positions.
"""

from typing import Self

import numpy as np
from torch import Tensor

from diagnostics.core.cluster_sums import apply_mask
from diagnostics.core.position_bins import decile_indices
from diagnostics.core.totals import Ratio


class Deciles(Ratio):
    """A `Mean` in each tenth of the response, by relative position; every sum is (10,).

    Computed values, for each non-empty tenth: "%0-10" to "%90-100" and the same with "_se". Every
    response is in every tenth (except for very short ones), so tenths compare one population at
    positions that differ between responses; a `PositionMean` compares equal positions of different
    populations.
    """

    @classmethod
    def from_values(
        cls,
        x: Tensor,
        mask: Tensor,
        cluster: Tensor | None = None,
        response: Tensor | None = None,
    ) -> Self:
        """Accumulate the mean of x over the mask, by tenth of the response.

        Args:
            x: (B, T) values.
            mask: (B, T) bool.
            cluster: (B,) cluster ids; each row is a cluster if None.
            response: (B, T) bool, the tokens that the response consists of; the mask if None.

        Returns:
            The accumulator.
        """
        tenth = decile_indices(mask if response is None else response)

        def sum_by_tenth(values: Tensor) -> Tensor:
            return values.new_zeros(len(values), 10).scatter_add(1, tenth, values)

        return cls.from_rows(
            sum_by_tenth(apply_mask(x, mask)), sum_by_tenth(mask.double()), cluster
        )

    @staticmethod
    def label_values(value: np.ndarray, error: np.ndarray, sums: np.ndarray) -> dict[str, float]:
        """Return values and standard errors of the non-empty tenths."""
        entries = {}
        for i in range(10):
            if sums[1][i] > 0:
                entries[f"%{10 * i}-{10 * i + 10}"] = float(value[i])
                entries[f"%{10 * i}-{10 * i + 10}_se"] = float(error[i])
        return entries
