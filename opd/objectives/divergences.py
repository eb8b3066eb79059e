"""Divergences of two distributions over a support, token by token."""

import math

import torch
from torch import Tensor
from torch.nn.functional import threshold

HUGE = 1e6
"""Nats that no divergence of positive probabilities reaches."""


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor, limit: float = math.inf) -> Tensor:
    """Return sum_v p (log p - log q) over the last axis; KL(p || q) if both sum to 1 there.

    Args:
        student_logp: (..., K) log p, with gradient through both the weight and the log.
        teacher_logp: (..., K) log q; no gradient flows through it.
        limit: Nats within which each log-ratio is clipped. Beyond it the log passes no gradient,
            only the weight does. The result is then no divergence and can be negative.

    Returns:
        (...) exact sums; an id with p = 0 contributes 0; infinite where p > 0 = q.
    """
    ratio = _finite(student_logp) - _finite(teacher_logp.detach())
    if limit < math.inf:
        return (student_logp.exp() * ratio.clamp(-limit, limit)).sum(-1)
    return _infinite_if_huge((student_logp.exp() * ratio).sum(-1))


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Return sum_v q (log q - log p) over the last axis.

    Only log p carries gradient: the logit gradient is p - q.

    Args:
        student_logp: (..., K) log p, with gradient.
        teacher_logp: (..., K) log q; no gradient flows through it.

    Returns:
        (...) exact sums; an id with q = 0 contributes 0; infinite where q > 0 = p.
    """
    target_logp = teacher_logp.detach()
    ratio = _finite(target_logp) - _finite(student_logp)
    return _infinite_if_huge((target_logp.exp() * ratio).sum(-1))


def jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """Return beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    By convention beta = 0 is the forward KL(q || p) and beta = 1 the reverse KL(p || q). These are
    not the limits of the divergence, which are 0; the divergence over beta, or over 1 - beta, tends
    to them. (arXiv 2306.13649, eq. 1.)

    Args:
        student_logp: (..., K) log p, with gradient.
        teacher_logp: (..., K) log q; no gradient flows through it.
        beta: Weight of the teacher in the mixture, in [0, 1].

    Returns:
        (...) divergences.
    """
    if beta == 0:
        return forward_kl(student_logp, teacher_logp)
    if beta == 1:
        return reverse_kl(student_logp, teacher_logp)
    target_logp = teacher_logp.detach()
    mixture = torch.logaddexp(target_logp + math.log(beta), student_logp + math.log1p(-beta))
    p, q = student_logp.exp(), target_logp.exp()
    term = beta * q * (target_logp - mixture) + (1 - beta) * p * (student_logp - mixture)
    return term.sum(-1)


def _finite(logp: Tensor) -> Tensor:
    """Raise -inf to the least finite number, so that a probability of 0 cancels it.

    `threshold` takes one pass each way, where `torch.where` takes the time of ten on a CPU.
    """
    lowest = torch.finfo(logp.dtype).min
    return threshold(logp, lowest, lowest)


def _infinite_if_huge(divergence: Tensor) -> Tensor:
    """Make a divergence infinite that contains a log-probability which `_finite` has raised.

    Its gradient is infinite, too, so that the optimizer skips the step.
    """
    factor = torch.where(divergence.detach() > HUGE, math.inf, 1.0)
    return divergence * factor.to(divergence.dtype)


def renormalise(logp: Tensor) -> Tensor:
    """Return log-probabilities renormalised over the last axis.

    Adding a constant per position changes nothing, so logits serve as well as log-probabilities.

    Args:
        logp: (..., K) log-probabilities or logits.

    Returns:
        (..., K) log-probabilities that sum to 1 over the last axis.
    """
    return logp.log_softmax(-1)
