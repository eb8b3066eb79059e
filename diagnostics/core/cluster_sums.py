"""Sums over clusters: what a ratio and its standard error need, and counts of masks.

Shapes: B responses, T response positions, S position slices (`diagnostics.core.position_bins`).
"""

from collections.abc import Callable
from functools import wraps
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.position_bins import bin_membership


def cache_last_result(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a function of one tensor so that its last result is reused.

    A panel calls the same function on one mask many times. The cache compares the identity of the
    argument and its version, which in-place changes increment, and does not keep the argument
    alive. Inference tensors have no version, so their results are not cached.

    Args:
        function: Function of one tensor.

    Returns:
        The caching function.
    """
    slot: list[tuple[ref[Tensor], int, Tensor] | None] = [None]

    @wraps(function)
    def cached_function(x: Tensor) -> Tensor:
        if x.is_inference():
            return function(x)
        entry = slot[0]  # read once: another thread may replace it meanwhile
        if entry is None or entry[0]() is not x or entry[1] != x._version:
            entry = slot[0] = (ref(x), x._version, function(x))
        return entry[2]

    return cached_function


@cache_last_result
def cluster_indices(ids: Tensor) -> Tensor:
    """Renumber (B,) ids from 0 to B - 1, equal where the ids are equal; `unique` would sync."""
    sorted_ids, order = ids.sort()
    is_new_id = torch.zeros_like(ids)
    is_new_id[1:] = sorted_ids[1:] != sorted_ids[:-1]
    return torch.empty_like(ids).scatter(0, order, is_new_id.cumsum(0))


def ratio_sums(
    numerator: Tensor, denominator: Tensor, cluster: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the six sums over clusters that a ratio and its standard error need.

    With N_c, D_c the sums of numerator and denominator over the rows of cluster c: sum N, sum D,
    number of clusters with D != 0, sum N^2, sum N D, sum D^2.

    Args:
        numerator: (B, ...).
        denominator: (B, ...).
        cluster: (B,) cluster ids, or None if each row is a cluster.

    Returns:
        The six sums, each (...).
    """
    x = torch.stack([numerator.double(), denominator.double()])
    if cluster is not None:
        x = torch.zeros_like(x).index_add_(1, cluster_indices(cluster), x)
    total, square = x.sum(1), x.square().sum(1)
    used, cross = (x[1] != 0).sum(0).double(), (x[0] * x[1]).sum(0)
    return total[0], total[1], used, square[0], cross, square[1]


def ratio_and_error(
    numerator: np.ndarray,
    denominator: np.ndarray,
    num_clusters: np.ndarray,
    square: np.ndarray,
    cross: np.ndarray,
    count_square: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute R = N/D and its standard error sqrt(c/(c-1) sum_c (N_c - R D_c)^2) / D (linearised).

    NaN where D is 0; the error is NaN with fewer than two clusters or unknown cluster sums.

    Args:
        numerator: Sum N.
        denominator: Sum D.
        num_clusters: Number c of clusters with D != 0.
        square: Sum over clusters of N_c^2.
        cross: Sum over clusters of N_c D_c.
        count_square: Sum over clusters of D_c^2.

    Returns:
        Ratio and standard error.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(denominator != 0, numerator / denominator, np.nan)
        spread = np.maximum(square - 2 * value * cross + value**2 * count_square, 0)
        error = np.where(
            num_clusters > 1,
            np.sqrt(num_clusters / (num_clusters - 1) * spread) / np.abs(denominator),
            np.nan,
        )
    return value, error


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return x in float64, detached, and 0 where the mask is False, even if x is NaN there."""
    return torch.where(mask, x.detach().double(), 0.0)


@cache_last_result
def row_counts(mask: Tensor) -> Tensor:
    """Return (B,) float64: number of True entries in each row of a mask (B,) or (B, T)."""
    return mask.double() if mask.dim() == 1 else mask.double().sum(1)


@cache_last_result
def position_counts(mask: Tensor) -> Tensor:
    """Return (B, S) float64: entries of each row of a mask (B, T), overall and by position bin."""
    return mask.double() @ bin_membership(mask.shape[1], mask.device)
