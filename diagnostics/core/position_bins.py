"""Position bins 0-1, 2-3, 4-7, ... in powers of two, the same for every batch.

A position is the index on the response axis: it counts everything after the prompt, including
tokens outside the mask, because that is the length of the prefix that the models condition on.
Shapes: T response positions, S slices: the whole response and then NUM_BINS bins.
"""

from functools import lru_cache

import torch
from torch import Tensor

NUM_BINS = 20
"""The last bin starts at 2^19 and also takes everything later."""

LABELS = ("", "@0-1", *(f"@{2**i}-{2 ** (i + 1) - 1}" for i in range(1, NUM_BINS)))
ERROR_LABELS = tuple(f"{label}_se" for label in LABELS)
"""Suffixes of the slices' values and of their standard errors."""


@lru_cache(maxsize=8)
def bin_membership(num_positions: int, device: torch.device) -> Tensor:
    """Return the membership matrix of positions in bins.

    Multiplying a (B, T) tensor by it sums over positions without indexing, hence without a host
    sync. The result is cached, as that of `bin_indices`: do not modify it.

    Args:
        num_positions: T.
        device: Device of the result.

    Returns:
        (T, S) float64: column 0 is all ones, column 1 + i is 1 in bin i.
    """
    membership = bin_indices(num_positions, device)[:, None] == torch.arange(
        NUM_BINS, device=device
    )
    all_positions = torch.ones((num_positions, 1), dtype=torch.bool, device=device)
    return torch.cat([all_positions, membership], 1).double()


@lru_cache(maxsize=8)
def bin_indices(num_positions: int, device: torch.device) -> Tensor:
    """Return (T,) long: the bin of each position, below NUM_BINS."""
    starts = 2 ** torch.arange(1, NUM_BINS, device=device)
    return (torch.arange(num_positions, device=device)[:, None] >= starts).sum(1)


def extents(mask: Tensor) -> Tensor:
    """Return (B,) long: number of positions up to the last True of the mask, 0 if none."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (positions * mask).amax(1)


def decile_indices(mask: Tensor) -> Tensor:
    """Return (B, T) long: the tenth of the response extent of each position, 9 beyond its end."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (10 * positions // extents(mask).clamp(min=1)[:, None]).clamp(max=9)
