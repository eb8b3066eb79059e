"""Exact functionals of the two next-token distributions at a prefix (access level L2).

Reduces over the vocabulary and keeps one number per token, so that callers feed chunks of tokens
and no (tokens, vocabulary) tensor outlives its chunk.
"""

import torch
from torch import Tensor


def functionals(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The fields of `diagnostics.batch.Prefix`, each (...), from full log-softmaxes.

    With p = exp student_logp, q = exp teacher_logp, l = log p - log q and y the sampled token:
    reverse_kl = sum p l, ratio_square = sum p l^2, entropies -sum p log p and -sum q log q,
    surprise_square = sum p (log p)^2, collision = sum p^2, overrated = sum p 1[p > q],
    teacher_max = max q, teacher_rank = 1 + #{v: q(v) > q(y)}. An id with p = 0 contributes 0.

    Args:
      student_logp, teacher_logp: (..., V) normalised.
      tokens: (...) long, the sampled ids.
    """
    p, q = student_logp.exp(), teacher_logp.exp()
    ratio = student_logp - teacher_logp
    zero = torch.zeros((), dtype=p.dtype, device=p.device)

    def mean_p(x: Tensor) -> Tensor:
        return torch.where(p > 0, p * x, zero).sum(-1)

    sampled = teacher_logp.gather(-1, tokens[..., None])
    return {
        "reverse_kl": mean_p(ratio),
        "ratio_square": mean_p(ratio.square()),
        "student_entropy": -mean_p(student_logp),
        "teacher_entropy": -torch.where(q > 0, q * teacher_logp, zero).sum(-1),
        "surprise_square": mean_p(student_logp.square()),
        "collision": p.square().sum(-1),
        "overrated": torch.where(ratio > 0, p, zero).sum(-1),
        "teacher_max": q.amax(-1),
        "teacher_rank": 1 + (teacher_logp > sampled).sum(-1).to(p.dtype),
    }
