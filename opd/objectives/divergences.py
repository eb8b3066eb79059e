"""Divergences of two distributions over a support, token by token."""

import math

import torch
from torch import Tensor


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor, limit: float = math.inf) -> Tensor:
    """sum_v p (log p - log q) over the last axis; KL(student || teacher) if both sum to 1 there.

    Args:
      student_logp: (..., K) with gradient, both in the weight and in the log.
      teacher_logp: (..., K); no gradient flows through it.
      limit: nats within which each log-ratio is held; beyond, the log passes no gradient on and
        only the weight does. No divergence any more: it can be negative.

    Returns:
      (...) exact; an id with p = 0 contributes 0.
    """
    p = student_logp.exp()
    ratio = student_logp - teacher_logp.detach()
    term = p * (ratio if limit == math.inf else ratio.clamp(-limit, limit))
    return torch.where(p > 0, term, torch.zeros_like(term)).sum(-1)


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """sum_v q (log q - log p) over the last axis: (..., K), (..., K) -> (...).

    Only the log of p carries gradient: logit gradient p - q. An id with q = 0 contributes 0.
    """
    theirs = teacher_logp.detach()
    q = theirs.exp()
    term = q * (theirs - student_logp)
    return torch.where(q > 0, term, torch.zeros_like(term)).sum(-1)


def jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: (..., K) x 2 -> (...).

    By convention beta = 0 is the forward KL(q || p) and beta = 1 the reverse KL(p || q). They are
    not its limits, which are 0: the divergence over beta, or over 1 - beta, tends to them.
    (arXiv 2306.13649, eq. 1.)
    """
    if beta == 0:
        return forward_kl(student_logp, teacher_logp)
    if beta == 1:
        return reverse_kl(student_logp, teacher_logp)
    theirs = teacher_logp.detach()
    mixture = torch.logaddexp(theirs + math.log(beta), student_logp + math.log1p(-beta))
    p, q = student_logp.exp(), theirs.exp()
    term = beta * q * (theirs - mixture) + (1 - beta) * p * (student_logp - mixture)
    return term.sum(-1)


def renormalise(logp: Tensor) -> Tensor:
    """Log-probabilities restricted to the last axis and renormalised there: (..., K) -> (..., K).

    Unchanged by a constant per position, so logits serve as well as true log-probabilities.
    """
    return logp.log_softmax(-1)
