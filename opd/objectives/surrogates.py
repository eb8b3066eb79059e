"""Surrogates: the loss of a visited token, whose gradient is the estimate.

Each takes what is known at a token and returns (...) losses; nothing is reduced here, and every
stop-gradient is visible. Local ones compare the models at the prefix; scores turn a credit into the
score function of the sampled token.

Shapes: K support ids; "..." is (B, T) or flat tokens (N,). p student, q teacher, S the support.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.credit import log_ratio
from opd.objectives.divergences import forward_kl, jensen_shannon, renormalise, reverse_kl

_NOTHING = -1e9
"""A log-probability of an absent id: its probability underflows to 0 in float32 and bfloat16."""

_FAR = 20.0
"""Nats by which the student may leave its rollout before the importance ratio stops following."""


@dataclass(frozen=True, kw_only=True)
class VisitedTokens:
    """What a surrogate may see at visited tokens; everything is local to the token.

    logp (...) and support_logp (..., K) carry the gradient of the student; credit (...),
    teacher_logp (...), teacher_support_logp (..., K) and old_logp (...), the student's
    log-probability when the rollouts were scored, are constants. present (..., K) bool: the ids of
    the support that count, all if None; inside (...) bool: the sampled token is one of them. What
    an objective does not read may be None: logp where not `sampled`, a support where it has none.
    """

    logp: Tensor | None
    credit: Tensor
    teacher_logp: Tensor
    old_logp: Tensor | None = None
    support_logp: Tensor | None = None
    teacher_support_logp: Tensor | None = None
    present: Tensor | None = None
    inside: Tensor | None = None


# --- divergences --------------------------------------------------------------------------------


# --- score functions of the credit --------------------------------------------------------------


def nothing(at: VisitedTokens) -> Tensor:
    """No loss."""
    return torch.zeros_like(at.teacher_logp)


def score_function(logp: Tensor, weight: Tensor) -> Tensor:
    """Loss whose gradient is weight * grad log p(y): (...), (...) -> (...).

    No gradient flows through the weight. Unbiased only if y was sampled from p itself: under
    top-p or another temperature E[grad log p] is not zero.
    """
    return logp * weight.detach()


def plain_score(at: VisitedTokens) -> Tensor:
    """credit * log p(y): right for the first optimizer step on a set of rollouts."""
    return score_function(sampled_logp(at), at.credit)


def weighted_score(at: VisitedTokens) -> Tensor:
    """rho * credit, rho = p(y) / p_old(y): for several optimizer steps on the same rollouts.

    Given the prefix its mean is E_p[credit]: the token is reweighted, while the prefixes and the
    credit stay those of the rollouts. At rho = 1 the gradient is that of `plain_score`.
    """
    return importance(at) * at.credit.detach()


def clipped_score(
    at: VisitedTokens, low: float = 0.2, high: float = 0.2, dual: float = 3.0
) -> Tensor:
    """PPO's loss with A = -credit: max(-A rho, -A clip(rho, 1 - low, 1 + high)), at most -A dual.

    The last bound holds where A < 0 only. The gradient is rho * credit * grad log p(y), and 0 where
    A > 0 and rho > 1 + high, or A < 0 and rho is below 1 - low or above `dual`: what has moved far
    enough, as the credit wanted, is left alone. At rho = 1 it is that of `plain_score`.
    (arXiv 1707.06347, eq. 7; the dual bound: arXiv 1912.09729.)
    """
    rho, cost = importance(at), at.credit.detach()
    loss = torch.maximum(cost * rho, cost * rho.clamp(1 - low, 1 + high))
    return torch.where(cost > 0, torch.minimum(loss, cost * dual), loss)


def importance(at: VisitedTokens) -> Tensor:
    """rho = p(y) / p_old(y) with gradient; constant beyond e^20 and e^-20, so that it is finite."""
    if at.old_logp is None:
        raise InvalidInput("an importance ratio needs old_logp, the student's when it was scored")
    return log_ratio(sampled_logp(at), at.old_logp.detach()).clamp(-_FAR, _FAR).exp()


# --- local surrogates ---------------------------------------------------------------------------


def full_reverse(at: VisitedTokens, limit: float = math.inf) -> Tensor:
    """KL(p || q) on the whole vocabulary."""
    return reverse_kl(*pair(at), limit)


def full_forward(at: VisitedTokens) -> Tensor:
    """KL(q || p) on the whole vocabulary."""
    return forward_kl(*pair(at))


def full_mixture(at: VisitedTokens, beta: float) -> Tensor:
    """`jensen_shannon` on the whole vocabulary."""
    return jensen_shannon(*pair(at), beta)


def renormalised(at: VisitedTokens, limit: float = math.inf) -> Tensor:
    """KL of both sides renormalised on the support S.

    Logit gradient p'_v (log p'_v/q'_v - KL(p' || q')) on S, exactly 0 outside: blind to how much
    mass either model has outside S, the more so the smaller p(S).
    """
    ours, theirs = pair(at)
    return reverse_kl(renormalise(ours), renormalise(theirs), limit)


def renormalised_and_sampled(at: VisitedTokens, limit: float = math.inf) -> Tensor:
    """The same on S and the sampled token."""
    ours, theirs = pair(at)
    outside = ~inside_support(at)
    ours = torch.cat([ours, _where(outside, sampled_logp(at))[..., None]], -1)
    theirs = torch.cat([theirs, _where(outside, at.teacher_logp.detach())[..., None]], -1)
    return reverse_kl(renormalise(ours), renormalise(theirs), limit)


def unnormalised(at: VisitedTokens, limit: float = math.inf) -> Tensor:
    """sum_S p log p/q, differentiated as it stands: it collapses.

    Its gradient holds grad p(S) besides the head's, so that descent pushes the student out of S;
    the minimum has p(S) = q(S)/e. (arXiv 2605.11182.)
    """
    return reverse_kl(*pair(at), limit)


def stopped(at: VisitedTokens) -> Tensor:
    """sum_S p sg(log p/q): the head of the full gradient, without grad p(S) and without a tail."""
    ours, theirs = pair(at)
    return (ours.exp() * (ours - theirs).detach()).sum(-1)


def bucket(at: VisitedTokens) -> Tensor:
    """KL of K + 1 events, the ids of S and all else; biased by the shape of the tail only."""
    ours, theirs = (torch.cat([x, _rest(x)], -1) for x in pair(at))
    return reverse_kl(ours, theirs)


def sampled_tail(at: VisitedTokens) -> Tensor:
    """Head of the full gradient, and outside S the sampled token's score function: unbiased."""
    return stopped(at) + _tail(at)


def published_tail(at: VisitedTokens) -> Tensor:
    """Un-normalised head plus sampled tail: unbiased in value, off by grad p(S) in gradient.

    (EMA-PG's correction as in arXiv 2603.25562 v2, V4 and V5.)
    """
    return unnormalised(at) + _tail(at)


def half_square(at: VisitedTokens) -> Tensor:
    """k2 = r^2 / 2 differentiated: r grad log p(y), the gradient of KL(student || teacher)."""
    return log_ratio(sampled_logp(at), at.teacher_logp.detach()).square() / 2


def low_variance(at: VisitedTokens) -> Tensor:
    """k3 = e^-r - 1 + r differentiated: (1 - e^-r) grad log p(y), that of KL(teacher || student)!

    Its value is unbiased for the reverse KL, its gradient is the forward KL's.
    """
    r = log_ratio(sampled_logp(at), at.teacher_logp.detach())
    return torch.expm1(-r) + r


@dataclass(frozen=True, kw_only=True)
class Form:
    """A local surrogate, and what there is to know of it without looking at the function.

    reads_sample: whether it looks at the sampled token's log-probability. takes_limit: whether its
    log-ratios can be held within a keyword argument `limit`. renormalises: whether it is the same
    with a constant added to all log-probabilities of a position.
    """

    surrogate: Callable[..., Tensor]
    reads_sample: bool = False
    takes_limit: bool = False
    renormalises: bool = False


# --- what is known at a token -------------------------------------------------------------------


def pair(at: VisitedTokens) -> tuple[Tensor, Tensor]:
    """(..., K) log-probabilities of student, with gradient, and teacher on the support.

    An absent id has probability 0 under both and passes no gradient on, whatever stands there.
    """
    if at.support_logp is None or at.teacher_support_logp is None:
        raise InvalidInput("this objective compares both models on a support; none was given")
    ours, theirs = at.support_logp, at.teacher_support_logp.detach()
    if at.present is None:
        return ours, theirs
    return _where(at.present, ours), _where(at.present, theirs)


def _where(present: Tensor, logp: Tensor) -> Tensor:
    return torch.where(present, logp, torch.full_like(logp, _NOTHING))


def _tail(at: VisitedTokens) -> Tensor:
    """The sampled token's cost times its score where it is outside S."""
    logp = sampled_logp(at)
    cost = log_ratio(logp, at.teacher_logp)
    return score_function(logp, torch.where(inside_support(at), torch.zeros_like(cost), cost))


def sampled_logp(at: VisitedTokens) -> Tensor:
    """(...) log p(y), with gradient."""
    if at.logp is None:
        raise InvalidInput(
            "this objective reads the sampled token's log-probability; none was given"
        )
    return at.logp


def inside_support(at: VisitedTokens) -> Tensor:
    """(...) bool: the sampled token is among the support's ids."""
    if at.inside is None:
        raise InvalidInput("this objective asks whether the sampled token is in the support")
    return at.inside


def _rest(logp: Tensor) -> Tensor:
    """(..., K) -> (..., 1) log of the mass outside, kept above that of one rounding error."""
    inside = logp.logsumexp(-1, keepdim=True).exp()
    return torch.log1p(-inside.clamp(max=1 - torch.finfo(logp.dtype).eps))
