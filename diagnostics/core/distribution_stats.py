"""Exact functionals of the two next-token distributions at a prefix (access level L2).

Reduces over the vocabulary and keeps one number per token, so that callers feed chunks of tokens
and no (tokens, vocabulary) tensor outlives its chunk. At most five temporaries of the size of a
chunk exist at once; on a CPU a chunk is cut again, into blocks that its cache holds.
"""

import torch
from torch import Tensor

_BLOCK = 1 << 17


@torch.no_grad()
def functionals(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The fields of `diagnostics.batch.DistributionStats`, each (...), from full log-softmaxes.

    With p = exp student_logp, q = exp teacher_logp, l = log p - log q and y the sampled token:
    reverse_kl = sum p l, ratio_square = sum p l^2, entropies -sum p log p and -sum q log q,
    surprise_square = sum p (log p)^2, collision = sum p^2, square_ratio = sum p^2 l,
    square_ratio_square = sum p^2 l^2, forward_kl = -sum q l, overrated = sum p 1[p > q],
    teacher_max = max q, teacher_rank = 1 + #{v: q(v) > q(y)}. An id with p = 0 contributes 0 to
    every sum over p, one with q = 0 to the teacher's entropy; p > 0 = q makes the divergence
    infinite, as it is. forward_kl ends at 1e30. Nothing here is differentiable.

    Args:
      student_logp, teacher_logp: (..., V) normalised.
      tokens: (...) long, the sampled ids.
    """
    size = student_logp.shape[-1]
    flat = (student_logp.reshape(-1, size), teacher_logp.reshape(-1, size), tokens.reshape(-1))
    rows = max(1, _BLOCK // size) if tokens.device.type == "cpu" else max(1, tokens.numel())
    blocks = [_block(*some) for some in zip(*(x.split(rows) for x in flat), strict=True)]
    return {k: torch.cat([b[k] for b in blocks]).reshape(tokens.shape) for k in blocks[0]}


def _block(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The same for (n, V). Branches cost more than arithmetic here, hence signs and clamps.

    -inf is raised to the least finite number, which p = 0 cancels; where p does not, the square
    is beyond any real one and tells that the divergence is infinite.
    """
    lowest = torch.finfo(student_logp.dtype).min
    ours = student_logp.clamp(min=lowest)
    theirs = teacher_logp.to(ours.dtype).clamp(min=lowest)
    sampled = theirs.gather(-1, tokens[:, None])
    q, p = theirs.exp(), ours.exp()
    teacher_entropy = -q.mul(theirs).sum(-1)
    found = {
        "teacher_entropy": teacher_entropy,
        "forward_kl": (-q.mul(ours).sum(-1) - teacher_entropy).clamp(max=1e30),
        "teacher_max": q.amax(-1),
        "teacher_rank": 1 + torch.sub(theirs, sampled, out=q).sign_().clamp_(min=0).sum(-1),
    }
    ratio, weighted = torch.sub(ours, theirs, out=theirs), torch.mul(p, ours, out=q)
    found["student_entropy"] = -weighted.sum(-1)
    found["surprise_square"] = weighted.mul_(ours).sum(-1)
    found["collision"] = torch.mul(p, p, out=ours).sum(-1)
    found["overrated"] = torch.sign(ratio, out=ours).clamp_(min=0).mul_(p).sum(-1)
    weighted = torch.mul(p, ratio, out=weighted)
    square = torch.mul(weighted, ratio, out=ours).sum(-1)
    costs = {
        "reverse_kl": weighted.sum(-1),
        "ratio_square": square,
        "square_ratio": p.mul_(weighted).sum(-1),
        "square_ratio_square": weighted.square_().sum(-1),
    }
    return found | {k: x.masked_fill(square > 1e30, torch.inf) for k, x in costs.items()}
