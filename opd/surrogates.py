"""Surrogates: the loss of a visited token, whose gradient is the estimate.

Each takes what is known at a token and returns (...) losses; nothing is reduced here, and every
stop-gradient is visible.

Shapes: K support ids; "..." is (B, T) or flat tokens (N,). p student, q teacher, S the support.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.credit import log_ratio

_NOTHING = -1e9
"""A log-probability of an absent id: its probability underflows to 0 in every float type."""


@dataclass(frozen=True, kw_only=True)
class Visited:
    """What a surrogate may see at visited tokens; everything is local to the token.

    logp (...) and support_logp (..., K) carry the gradient of the student; credit (...),
    teacher_logp (...) and teacher_support_logp (..., K) are constants; inside (...) bool: the
    sampled token is one of the support's ids.
    """

    logp: Tensor
    credit: Tensor
    teacher_logp: Tensor
    support_logp: Tensor | None = None
    teacher_support_logp: Tensor | None = None
    inside: Tensor | None = None


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """sum_v p (log p - log q) over the last axis; KL(student || teacher) if both sum to 1 there.

    Args:
      student_logp: (..., K) with gradient, both in the weight and in the log.
      teacher_logp: (..., K); no gradient flows through it.

    Returns:
      (...) exact; an id with p = 0 contributes 0.
    """
    p = student_logp.exp()
    term = p * (student_logp - teacher_logp.detach())
    return torch.where(p > 0, term, torch.zeros_like(term)).sum(-1)


def renormalise(logp: Tensor) -> Tensor:
    """Log-probabilities restricted to the last axis and renormalised there: (..., K) -> (..., K).

    Unchanged by a constant per position, so logits serve as well as true log-probabilities.
    """
    return logp.log_softmax(-1)


def score_function(logp: Tensor, weight: Tensor) -> Tensor:
    """Loss whose gradient is weight * grad log p(y): (...), (...) -> (...).

    No gradient flows through the weight. Unbiased only if y was sampled from p itself: under
    top-p or another temperature E[grad log p] is not zero.
    """
    return logp * weight.detach()


def renormalised(at: Visited) -> Tensor:
    """KL of both sides renormalised on the support S.

    Logit gradient p'_v (log p'_v/q'_v - KL(p' || q')) on S, exactly 0 outside: blind to how much
    mass either model has outside S, the more so the smaller p(S).
    """
    return reverse_kl(*map(renormalise, pair(at)))


def renormalised_and_sampled(at: Visited) -> Tensor:
    """The same on S and the sampled token."""
    ours, theirs = pair(at)
    outside = ~_inside(at)[..., None]
    nothing = torch.full_like(at.credit, _NOTHING)[..., None]
    ours = torch.cat([ours, torch.where(outside, at.logp[..., None], nothing)], -1)
    theirs = torch.cat([theirs, torch.where(outside, at.teacher_logp[..., None], nothing)], -1)
    return reverse_kl(renormalise(ours), renormalise(theirs))


def unnormalised(at: Visited) -> Tensor:
    """sum_S p log p/q, differentiated as it stands: it collapses.

    Its gradient holds grad p(S) besides the head's, so that descent pushes the student out of S;
    the minimum has p(S) = q(S)/e. (arXiv 2605.11182.)
    """
    return reverse_kl(*pair(at))


def stopped(at: Visited) -> Tensor:
    """sum_S p sg(log p/q): the head of the full gradient, without grad p(S) and without a tail."""
    ours, theirs = pair(at)
    return (ours.exp() * (ours - theirs).detach()).sum(-1)


def bucket(at: Visited) -> Tensor:
    """KL of K + 1 events, the ids of S and all else; biased by the shape of the tail only."""
    ours, theirs = (torch.cat([x, _rest(x)], -1) for x in pair(at))
    return reverse_kl(ours, theirs)


def sampled_tail(at: Visited) -> Tensor:
    """Head of the full gradient, and outside S the sampled token's score function: unbiased."""
    cost = log_ratio(at.logp, at.teacher_logp)
    return stopped(at) + score_function(at.logp, torch.where(_inside(at), 0.0, cost))


def published_tail(at: Visited) -> Tensor:
    """Un-normalised head plus sampled tail: unbiased in value, off by grad p(S) in gradient.

    (EMA-PG's correction as in arXiv 2603.25562 v2, V4 and V5.)
    """
    cost = log_ratio(at.logp, at.teacher_logp)
    return unnormalised(at) + score_function(at.logp, torch.where(_inside(at), 0.0, cost))


def half_square(at: Visited) -> Tensor:
    """k2 = r^2 / 2 differentiated: r grad log p(y), the gradient of KL(student || teacher)."""
    return log_ratio(at.logp, at.teacher_logp.detach()).square() / 2


def low_variance(at: Visited) -> Tensor:
    """k3 = e^-r - 1 + r differentiated: (1 - e^-r) grad log p(y), that of KL(teacher || student)!

    Its value is unbiased for the reverse KL, its gradient is the forward KL's.
    """
    r = log_ratio(at.logp, at.teacher_logp.detach())
    return torch.expm1(-r) + r


def pair(at: Visited) -> tuple[Tensor, Tensor]:
    """(..., K) log-probabilities of student, with gradient, and teacher on the support."""
    if at.support_logp is None or at.teacher_support_logp is None:
        raise ValueError("this objective compares both models on a support; none was given")
    return at.support_logp, at.teacher_support_logp.detach()


def _inside(at: Visited) -> Tensor:
    if at.inside is None:
        raise ValueError("this objective asks whether the sampled token is in the support")
    return at.inside


def _rest(logp: Tensor) -> Tensor:
    """(..., K) -> (..., 1) log of the mass outside, kept above that of one rounding error."""
    inside = logp.logsumexp(-1, keepdim=True).exp()
    return torch.log1p(-inside.clamp(max=1 - torch.finfo(logp.dtype).eps))
