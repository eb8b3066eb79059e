"""Rows of different lengths as (B, T) tensors: padding, masks, and the flat order of their tokens.

Shapes: B rows, T positions, N tokens of a mask in row-major order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def right_pad(rows: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Return rows of numbers (T_i, ...) as a (B, T, ...) tensor, padded on the right with zeros."""
    return pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True)


def left_pad(rows: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Return rows of numbers (T_i, ...) as a (B, T, ...) tensor, padded on the left with zeros."""
    tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_side="left")


def up_to_last(mask: Tensor) -> Tensor:
    """Return (B, T) bool: the positions up to the last True of each row, without holes."""
    return mask.long().flip(1).cumsum(1).flip(1) > 0


def flat_index(mask: Tensor) -> Tensor:
    """Return (B, T) long: the index of each token of the mask among all N, in row-major order.

    Args:
        mask: (B, T) bool.

    Returns:
        The indices; where the mask is False the value has no meaning.
    """
    return (mask.flatten().cumsum(0) - 1).reshape(mask.shape)


def scatter_to_mask(flat: Tensor, mask: Tensor) -> Tensor:
    """Scatter (N, ...) values in row-major order of the mask to (B, T, ...), with 0 elsewhere.

    The inverse of `x[mask]`.

    Args:
        flat: (N, ...) values.
        mask: (B, T) bool with N True entries.

    Returns:
        (B, T, ...) values.
    """
    out = flat.new_zeros((*mask.shape, *flat.shape[1:]))
    out[mask] = flat
    return out
