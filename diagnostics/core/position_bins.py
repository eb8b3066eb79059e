"""Position bins: 0-1, 2-3, 4-7, ... in powers of two, the same for every batch.

A position is the index on the response axis: it counts everything after the prompt, also what the
mask leaves out, because that is the length of the prefix that the models condition on.
Shapes: T response positions, S slices: the whole response and then NUM_BINS bins.
"""

from functools import lru_cache

import torch
from torch import Tensor

NUM_BINS = 20
"""The last bin starts at 2^19 and also takes everything later."""

LABELS = ("", "@0-1", *(f"@{2**i}-{2 ** (i + 1) - 1}" for i in range(1, NUM_BINS)))


@lru_cache(maxsize=8)
def slices(num_positions: int, device: torch.device) -> Tensor:
    """(T, S) float64 membership: column 0 is all ones, column 1 + i is 1 in bin i.

    A product with it sums a (B, T) tensor by position without indexing, hence without a host sync.
    Kept for the next call, like `numbers`: not to be written to.
    """
    member = numbers(num_positions, device)[:, None] == torch.arange(NUM_BINS, device=device)
    everything = torch.ones((num_positions, 1), dtype=torch.bool, device=device)
    return torch.cat([everything, member], 1).double()


@lru_cache(maxsize=8)
def numbers(num_positions: int, device: torch.device) -> Tensor:
    """(T,) long: the bin of each position, below NUM_BINS."""
    starts = 2 ** torch.arange(1, NUM_BINS, device=device)
    return (torch.arange(num_positions, device=device)[:, None] >= starts).sum(1)


def extents(mask: Tensor) -> Tensor:
    """(B,) long: positions up to and with the last one of the mask, 0 where there is none."""
    place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (place * mask).amax(1)


def tenths(mask: Tensor) -> Tensor:
    """(B, T) long: the tenth of the response's extent that a position is in, 9 beyond its end."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return (10 * place // extents(mask).clamp(min=1)[:, None]).clamp(max=9)
