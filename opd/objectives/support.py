"""Joint supports of two top-K lists: union and intersection.

Shapes: K ids per list; "..." is (B, T) or flat tokens (N,).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def union(teacher_ids: Tensor, student_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's ids followed by the student's, with duplicates marked as absent.

    Args:
        teacher_ids: (..., K) long, without repetition.
        student_ids: (..., K) long, without repetition.

    Returns:
        ids (..., 2K) and present (..., 2K) bool; every present id occurs once.
    """
    new = ~_contained_in(student_ids, teacher_ids)
    present = torch.cat([torch.ones_like(teacher_ids, dtype=torch.bool), new], -1)
    return torch.cat([teacher_ids, student_ids], -1), present


def intersection(teacher_ids: Tensor, student_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's ids, with those that the student's list lacks marked as absent.

    Nothing is present where the lists have no id in common.

    Args:
        teacher_ids: (..., K) long, without repetition.
        student_ids: (..., K) long, without repetition.

    Returns:
        ids (..., K) and present (..., K) bool.
    """
    return teacher_ids, _contained_in(teacher_ids, student_ids)


def _contained_in(ids: Tensor, reference_ids: Tensor) -> Tensor:
    """Return (..., K) bool, whether an id is a reference id, without a (..., K, K) comparison."""
    sorted_ids = reference_ids.sort(-1).values
    positions = torch.searchsorted(sorted_ids, ids.contiguous()).clamp(
        max=reference_ids.shape[-1] - 1
    )
    return sorted_ids.gather(-1, positions) == ids


JOINT_SUPPORTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "union": union,
    "intersection": intersection,
}
