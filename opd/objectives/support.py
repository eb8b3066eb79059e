"""Supports made of two top-K lists: the ids that either model, or both, think probable.

Shapes: K ids a list; "..." is (B, T) or flat tokens (N,).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def union(teacher_ids: Tensor, student_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's ids, then the student's; one that the teacher has too is absent there.

    Args:
      teacher_ids, student_ids: (..., K) long, each without repetition.

    Returns:
      ids (..., 2K) and present (..., 2K) bool: among the present ids each stands once.
    """
    new = ~_among(student_ids, teacher_ids)
    present = torch.cat([torch.ones_like(teacher_ids, dtype=torch.bool), new], -1)
    return torch.cat([teacher_ids, student_ids], -1), present


def intersection(teacher_ids: Tensor, student_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's ids; one that the student has not among its own is absent.

    Nothing is present where the lists have nothing in common.

    Args:
      teacher_ids, student_ids: (..., K) long, each without repetition.

    Returns:
      ids (..., K) and present (..., K) bool.
    """
    return teacher_ids, _among(teacher_ids, student_ids)


def _among(ids: Tensor, others: Tensor) -> Tensor:
    """(..., K) bool: the id is one of the others, without a (..., K, K) comparison."""
    ordered = others.sort(-1).values
    at = torch.searchsorted(ordered, ids.contiguous()).clamp(max=others.shape[-1] - 1)
    return ordered.gather(-1, at) == ids


JOINED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "union": union,
    "intersection": intersection,
}
