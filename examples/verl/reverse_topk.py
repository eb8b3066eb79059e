"""Reverse KLs on a top-K that were proposed for verl, to be audited: none of them is in verl 0.9.

    opd audit examples/verl/reverse_topk.py:student_support_cut

Written from the public descriptions. The first draft of verl's distillation (pull request 5041,
January 2026) summed over the union of both top-K, first as it is, then over absolute terms, then
cut at 0 (`union`, `union_absolute`, `union_cut`); its author saw the student leave the support and
took it out. A later proposal (pull request 7806, September 2026) sums over the student's top-K and
saw no collapse; verl's function for a loss on a top-K, under which it is registered, cuts each
position's loss at 0 (`student_support_cut`).

Shapes: B responses, T positions, V vocabulary, K ids.
"""

import math

import torch
from torch import Tensor

LOWEST = math.log(1e-8)
"""Log-probability at which the draft of the union cuts."""


def student_support(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int = 2
) -> Tensor:
    """Return the mean sum of p log(p/q) over the student's top-K, not normalised.

    Args:
        student_logits: (B, T, V).
        teacher_logits: (B, T, V).
        mask: (B, T) bool.
        k: K.

    Returns:
        Scalar.
    """
    return token_mean(on_student_support(student_logits, teacher_logits, k), mask)


def student_support_cut(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int = 2
) -> Tensor:
    """Return `student_support` with each position's sum cut at 0."""
    return token_mean(on_student_support(student_logits, teacher_logits, k).clamp(min=0.0), mask)


def union(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int = 2) -> Tensor:
    """Return the mean sum of p log(p/q) over the top-K of both models, not normalised."""
    return token_mean(union_terms(student_logits, teacher_logits, k).sum(-1), mask)


def union_absolute(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int = 2
) -> Tensor:
    """Return the mean sum of the absolute terms of `union`."""
    return token_mean(union_terms(student_logits, teacher_logits, k).abs().sum(-1), mask)


def union_cut(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int = 2) -> Tensor:
    """Return `union` with each position's sum cut at 0."""
    sums = union_terms(student_logits, teacher_logits, k).sum(-1)
    return token_mean(sums.clamp(min=0.0), mask)


def on_student_support(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """Return (B, T) sums of p log(p/q) over the student's top-K."""
    ids = student_logits.detach().topk(k, -1).indices
    p, q = support_logp(student_logits, ids), support_logp(teacher_logits.detach(), ids)
    return (p.exp() * (p - q)).sum(-1)


def union_terms(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """Return (B, T, 2 K) terms p log(p/q), each id of the union once.

    Args:
        student_logits: (B, T, V).
        teacher_logits: (B, T, V).
        k: K.

    Returns:
        The terms, 0 at an id that both models have.
    """
    student_ids = student_logits.detach().topk(k, -1).indices
    teacher_ids = teacher_logits.topk(k, -1).indices
    ids = torch.cat([student_ids, teacher_ids], -1)
    is_repeated = (teacher_ids[..., :, None] == student_ids[..., None, :]).any(-1)
    is_repeated = torch.cat([torch.zeros_like(is_repeated), is_repeated], -1)
    p = support_logp(student_logits, ids).clamp(min=LOWEST)
    q = support_logp(teacher_logits.detach(), ids).clamp(min=LOWEST)
    return torch.where(is_repeated, 0.0, p.exp() * (p - q))


def support_logp(logits: Tensor, ids: Tensor) -> Tensor:
    """Return (B, T, K) log-probabilities of ids."""
    return logits.log_softmax(-1).gather(-1, ids)


def token_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of (B, T) losses over the mask."""
    return torch.where(mask, losses, 0.0).sum() / mask.sum()
