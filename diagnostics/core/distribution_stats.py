"""Exact statistics of the student's and teacher's next-token distributions (access level L2).

The vocabulary axis is reduced to one number per token. Callers pass chunks of tokens, so that no
(tokens, vocabulary) tensor outlives its chunk. At most five temporaries of the size of a chunk
exist at once; on a CPU a chunk is split again into blocks that fit its cache.
"""

import torch
from torch import Tensor

_BLOCK = 1 << 19


@torch.no_grad()
def compute_distribution_stats(
    student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    """Compute the fields of `diagnostics.batch.DistributionStats` from full log-softmaxes.

    With p = exp student_logp, q = exp teacher_logp, l = log p - log q and y the sampled token:
    reverse_kl = sum p l, ratio_square = sum p l^2, entropies -sum p log p and -sum q log q,
    surprise_square = sum p (log p)^2, collision = sum p^2, square_ratio = sum p^2 l,
    square_ratio_square = sum p^2 l^2, forward_kl = -sum q l, overrated = sum p 1[p > q],
    teacher_max = max q, teacher_rank = 1 + #{v: q(v) > q(y)}. An id with p = 0 contributes 0 to
    every sum over p, one with q = 0 contributes 0 to the teacher's entropy; p > 0 = q makes the
    divergence infinite. forward_kl is limited to 1e30. The results carry no gradient.

    Args:
        student_logp: (..., V) normalised log-probabilities of the student.
        teacher_logp: (..., V) normalised log-probabilities of the teacher.
        tokens: (...) long, the sampled ids.

    Returns:
        Field name to (...) values.
    """
    vocab_size = student_logp.shape[-1]
    flat_inputs = (
        student_logp.reshape(-1, vocab_size),
        teacher_logp.reshape(-1, vocab_size),
        tokens.reshape(-1),
    )
    tokens_per_block = (
        max(1, _BLOCK // vocab_size) if tokens.device.type == "cpu" else max(1, tokens.numel())
    )
    blocks = [
        _block(*tensors)
        for tensors in zip(*(x.split(tokens_per_block) for x in flat_inputs), strict=True)
    ]
    return {k: torch.cat([b[k] for b in blocks]).reshape(tokens.shape) for k in blocks[0]}


def _block(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Compute the statistics of one block of n tokens.

    Branches cost more than arithmetic here, hence comparisons into floats and clamps. -inf is
    raised to the least finite number, which p = 0 cancels; where p > 0, the square exceeds any real
    one, which marks the divergence as infinite.

    Args:
        student_logp: (n, V).
        teacher_logp: (n, V).
        tokens: (n,).

    Returns:
        Field name to (n,) values.
    """
    lowest = torch.finfo(student_logp.dtype).min
    student = student_logp.clamp(min=lowest)
    teacher = teacher_logp.to(student.dtype).clamp(min=lowest)
    sampled = teacher.gather(-1, tokens[:, None])
    q, p = teacher.exp(), student.exp()
    teacher_entropy = -q.mul(teacher).sum(-1)
    stats = {
        "teacher_entropy": teacher_entropy,
        "forward_kl": (-q.mul(student).sum(-1) - teacher_entropy).clamp(max=1e30),
        "teacher_max": q.amax(-1),
        "teacher_rank": 1 + torch.gt(teacher, sampled, out=q).sum(-1),
    }
    ratio, weighted = torch.sub(student, teacher, out=teacher), torch.mul(p, student, out=q)
    stats["student_entropy"] = -weighted.sum(-1)
    stats["surprise_square"] = weighted.mul_(student).sum(-1)
    stats["collision"] = torch.mul(p, p, out=student).sum(-1)
    stats["overrated"] = torch.gt(ratio, 0, out=student).mul_(p).sum(-1)
    weighted = torch.mul(p, ratio, out=weighted)
    square = torch.mul(weighted, ratio, out=student).sum(-1)
    cost_stats = {
        "reverse_kl": weighted.sum(-1),
        "ratio_square": square,
        "square_ratio": p.mul_(weighted).sum(-1),
        "square_ratio_square": weighted.mul_(weighted).sum(-1),
    }
    return stats | {k: x.masked_fill(square > 1e30, torch.inf) for k, x in cost_stats.items()}
