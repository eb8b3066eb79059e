"""EOS ids of two models, and their mapping from one model to the other."""

from dataclasses import dataclass

import torch
from torch import Tensor


def first_occurrences(ids: Tensor, mask: Tensor) -> Tensor:
    """Return (..., T) bool, whether an id occurs for the first time in its row.

    Args:
        ids: (..., T) long.
        mask: (..., T) bool; other positions are ignored and False in the result.

    Returns:
        (..., T) bool.
    """
    sorted_ids, order = torch.where(mask, ids, -1).sort(stable=True, dim=-1)
    is_first = torch.ones_like(mask)
    is_first[..., 1:] = sorted_ids[..., 1:] != sorted_ids[..., :-1]
    return torch.empty_like(mask).scatter(-1, order, is_first) & mask


@dataclass(frozen=True)
class EosMap:
    """EOS ids of both models; the first of each replaces EOS ids of the other model."""

    student: tuple[int, ...]
    """Ids that end a response of the student."""
    teacher: tuple[int, ...]
    """Ids that end a response of the teacher."""


def teacher_tokens(tokens: Tensor, eos_map: EosMap) -> Tensor:
    """Return the ids at which the teacher is read: its own EOS where the student used another one.

    An EOS that both models know keeps its id. Only the score of the last token changes, as nothing
    follows it. Without this mapping a response that ends with the student's EOS costs tens of nats
    although the teacher would have ended it too (2603.25562, figure 5).

    Args:
        tokens: Ids of any shape.
        eos_map: EOS ids of both models.

    Returns:
        Ids of the same shape.
    """
    return _replace_foreign_eos(tokens, eos_map.student, eos_map.teacher)


def student_tokens(tokens: Tensor, eos_map: EosMap) -> Tensor:
    """Return ids that the teacher wrote as the student would: its own EOS for a foreign one.

    Args:
        tokens: Ids of any shape.
        eos_map: EOS ids of both models.

    Returns:
        Ids of the same shape.
    """
    return _replace_foreign_eos(tokens, eos_map.teacher, eos_map.student)


def student_support(ids: Tensor, eos_map: EosMap) -> tuple[Tensor, Tensor]:
    """Return the ids at which the student is read on the teacher's top-K, and which of them count.

    A teacher EOS that the student does not know is read at the student's own EOS, as in the
    published code of 2603.25562.

    Args:
        ids: (..., K) in descending order of teacher probability.
        eos_map: EOS ids of both models.

    Returns:
        Ids (..., K), and (..., K) bool that is False at the less probable of two equal ids.
    """
    mapped_ids = _replace_foreign_eos(ids, eos_map.teacher, eos_map.student)
    return mapped_ids, first_occurrences(mapped_ids, torch.ones_like(mapped_ids, dtype=torch.bool))


def _replace_foreign_eos(
    ids: Tensor, source_eos: tuple[int, ...], target_eos: tuple[int, ...]
) -> Tensor:
    """Replace ids that are EOS ids of the source only by the first EOS id of the target."""
    foreign_eos = torch.tensor(
        sorted(set(source_eos) - set(target_eos)), dtype=torch.long, device=ids.device
    )
    return torch.where(torch.isin(ids, foreign_eos), target_eos[0], ids)
