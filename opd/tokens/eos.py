"""End-of-sequence ids of two models, and the student's end read as the teacher's."""

from dataclasses import dataclass

import torch
from torch import Tensor


def first_of_each(ids: Tensor, among: Tensor) -> Tensor:
    """(..., T) bool: where an id occurs for the first time in its row, of positions in `among`."""
    ordered, order = torch.where(among, ids, -1).sort(stable=True, dim=-1)
    fresh = torch.ones_like(among)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.empty_like(among).scatter(-1, order, fresh) & among


@dataclass(frozen=True)
class EosMap:
    """Ids that end a response for each model, the one to read for a foreign end first."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]


def teacher_tokens(tokens: Tensor, endings: EosMap) -> Tensor:
    """The ids at which the teacher is read: its own end where the student used a foreign one.

    tokens: any shape. An end that both models know keeps its id. Only the score of the last token
    changes, as nothing follows it. Without this a response that ends in the student's way costs
    tens of nats, though the teacher would have ended it too (2603.25562, figure 5).
    """
    return _swap(tokens, endings.student, endings.teacher)


def student_support(ids: Tensor, endings: EosMap) -> tuple[Tensor, Tensor]:
    """The ids at which the student is read on the teacher's top-K, and which of them count.

    ids: (..., K) in descending order of the teacher. The teacher's foreign end is read at the
    student's own end, as in the published code of 2603.25562. Where that id then stands twice, the
    more probable one counts: the second result, (..., K) bool, is False at the other.
    """
    read = _swap(ids, endings.teacher, endings.student)
    return read, first_of_each(read, torch.ones_like(read, dtype=torch.bool))


def _swap(ids: Tensor, own: tuple[int, ...], theirs: tuple[int, ...]) -> Tensor:
    foreign = torch.tensor(sorted(set(own) - set(theirs)), dtype=torch.long, device=ids.device)
    return torch.where(torch.isin(ids, foreign), theirs[0], ids)
