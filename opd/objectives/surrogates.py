"""Surrogate losses of tokens, whose gradients are the estimates.

Each surrogate takes TokenInputs and returns (...) losses. Nothing is reduced here, and every
stop-gradient is explicit. Local surrogates compare the models at the prefix; score surrogates turn
a credit into the score function of the sampled token.

Shapes: K support ids; "..." is (B, T) or flat tokens (N,). p is the student, q the teacher, S the
support.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.credit import log_ratio
from opd.objectives.divergences import forward_kl, jensen_shannon, renormalise, reverse_kl
from opd.objectives.inputs import TokenInputs, teacher_sampled_logp

_ABSENT_LOGP = -1e9
"""Log-probability of an absent id: its probability underflows to 0 in float32 and bfloat16."""

_MAX_LOG_RATIO = 20.0
"""Nats between the student and itself at scoring time beyond which rho is constant."""


# --- score functions of the credit --------------------------------------------------------------


def no_loss(inputs: TokenInputs) -> Tensor:
    """Return a loss of zero."""
    return torch.zeros_like(inputs.credit)


def score_function(logp: Tensor, weight: Tensor) -> Tensor:
    """Return a loss whose gradient is weight * grad log p(y).

    Unbiased only if y was sampled from p itself: under top-p or another temperature E[grad log p]
    is not zero.

    Args:
        logp: (...) student log-probability of the sampled token, with gradient.
        weight: (...) weight; no gradient flows through it.

    Returns:
        (...) losses.
    """
    return logp * weight.detach()


def plain_score(inputs: TokenInputs) -> Tensor:
    """Return credit * log p(y), correct for the first optimizer step on a set of rollouts."""
    return score_function(sampled_logp(inputs), inputs.credit)


def weighted_score(inputs: TokenInputs) -> Tensor:
    """Return rho * credit, rho = p(y) / p_old(y), for several optimizer steps on the same rollouts.

    At a given prefix its mean is E_p[credit]: the token is reweighted, but the prefixes and the
    credit are those of the rollouts. At rho = 1 the gradient is that of `plain_score`.

    Args:
        inputs: Tokens with `logp`, `old_logp` and `credit`.

    Returns:
        (...) losses.
    """
    return importance(inputs) * inputs.credit.detach()


def clipped_score(
    inputs: TokenInputs, low: float = 0.2, high: float = 0.2, dual: float = 3.0
) -> Tensor:
    """Return PPO's loss for the advantage A = -credit, with a dual bound.

    max(-A rho, -A clip(rho, 1 - low, 1 + high)), and at most -A dual where A < 0. The gradient is
    rho * credit * grad log p(y). It is 0 where A > 0 and rho > 1 + high, or where A < 0 and rho is
    below 1 - low or above `dual`: the token has already moved far enough. At rho = 1 it is that of
    `plain_score`. (arXiv 1707.06347, eq. 7; the dual bound: arXiv 1912.09729.)

    Args:
        inputs: Tokens with `logp`, `old_logp` and `credit`.
        low: Clip below 1.
        high: Clip above 1.
        dual: Bound on the ratio of tokens with a negative advantage.

    Returns:
        (...) losses.
    """
    rho, cost = importance(inputs), inputs.credit.detach()
    loss = torch.maximum(cost * rho, cost * rho.clamp(1 - low, 1 + high))
    return torch.where(cost > 0, torch.minimum(loss, cost * dual), loss)


def importance(inputs: TokenInputs) -> Tensor:
    """Return rho = p(y) / p_old(y) with gradient; constant beyond e^20 and e^-20 to stay finite.

    p_old is the student when the rollouts were scored. Ratios to another sampler are `RATIOS` of
    `opd.objectives.credit`.

    Args:
        inputs: Tokens with `logp` and `old_logp`.

    Returns:
        (...) importance ratios.

    Raises:
        InvalidInput: `old_logp` is missing.
    """
    if inputs.old_logp is None:
        raise InvalidInput(
            "an importance ratio needs the student's log-probability at scoring time, but old_logp "
            "is None; pass it"
        )
    return (
        log_ratio(sampled_logp(inputs), inputs.old_logp.detach())
        .clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        .exp()
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score function of the credit and its declared properties."""

    function: Callable[..., Tensor]
    """Function of TokenInputs, and of `low`, `high` and `dual` where it is clippable."""
    importance_weighted: bool = False
    """Whether it is weighted by p(y) / p_old(y), so that tokens sampled by an older student may be
    used.
    """
    clippable: bool = False
    """Whether it takes PPO's clip: the keyword arguments `low`, `high` and `dual`."""


PLAIN_SCORE = Score(function=plain_score)


# --- local surrogates ---------------------------------------------------------------------------


def full_reverse(inputs: TokenInputs, limit: float = math.inf) -> Tensor:
    """Return KL(p || q) on the whole vocabulary."""
    return reverse_kl(*support_log_probs(inputs), limit)


def full_forward(inputs: TokenInputs) -> Tensor:
    """Return KL(q || p) on the whole vocabulary."""
    return forward_kl(*support_log_probs(inputs))


def full_mixture(inputs: TokenInputs, beta: float = 0.5) -> Tensor:
    """Return `jensen_shannon` on the whole vocabulary."""
    return jensen_shannon(*support_log_probs(inputs), beta)


def renormalised(inputs: TokenInputs, limit: float = math.inf) -> Tensor:
    """Return the KL of both models renormalised on the support S.

    The logit gradient is p'_v (log p'_v/q'_v - KL(p' || q')) on S and exactly 0 outside. It ignores
    how much mass either model has outside S, which matters more the smaller p(S) is.

    Args:
        inputs: Tokens with a support.
        limit: Nats within which each log-ratio is clipped.

    Returns:
        (...) losses.
    """
    student_logp, teacher_logp = support_log_probs(inputs)
    return reverse_kl(renormalise(student_logp), renormalise(teacher_logp), limit)


def renormalised_and_sampled(inputs: TokenInputs, limit: float = math.inf) -> Tensor:
    """Return `renormalised` on S extended by the sampled token."""
    student_logp, support_teacher_logp = support_log_probs(inputs)
    outside = ~inside_support(inputs)
    student_logp = torch.cat(
        [student_logp, _fill_absent(outside, sampled_logp(inputs))[..., None]], -1
    )
    support_teacher_logp = torch.cat(
        [support_teacher_logp, _fill_absent(outside, teacher_sampled_logp(inputs))[..., None]], -1
    )
    return reverse_kl(renormalise(student_logp), renormalise(support_teacher_logp), limit)


def unnormalised(inputs: TokenInputs, limit: float = math.inf) -> Tensor:
    """Return sum_S p log p/q, differentiated directly; it collapses.

    Its gradient contains grad p(S) besides that of the head, so that descent pushes the student out
    of S; the minimum has p(S) = q(S)/e. (arXiv 2605.11182.)

    Args:
        inputs: Tokens with a support.
        limit: Nats within which each log-ratio is clipped.

    Returns:
        (...) losses.
    """
    return reverse_kl(*support_log_probs(inputs), limit)


def stopped(inputs: TokenInputs) -> Tensor:
    """Return sum_S p sg(log p/q): the head of the full gradient without grad p(S) and tail."""
    student_logp, teacher_logp = support_log_probs(inputs)
    return (student_logp.exp() * (student_logp - teacher_logp).detach()).sum(-1)


def bucket(inputs: TokenInputs) -> Tensor:
    """Return the KL of K + 1 events, the ids of S and the rest; ignores the shape of the tail."""
    student_logp, teacher_logp = (
        torch.cat([logp, _log_tail_mass(logp)], -1) for logp in support_log_probs(inputs)
    )
    return reverse_kl(student_logp, teacher_logp)


def sampled_tail(inputs: TokenInputs) -> Tensor:
    """Return `stopped` plus, outside S, the sampled token's cost times its score: unbiased."""
    return stopped(inputs) + _tail(inputs)


def published_tail(inputs: TokenInputs) -> Tensor:
    """Return the un-normalised head plus the sampled tail.

    Unbiased in value, but its gradient is off by grad p(S). (EMA-PG's correction as in arXiv
    2603.25562 v2, V4 and V5.)

    Args:
        inputs: Tokens with a support, `logp` and `inside`.

    Returns:
        (...) losses.
    """
    return unnormalised(inputs) + _tail(inputs)


def negative_log_likelihood(inputs: TokenInputs) -> Tensor:
    """Return -log p(y), the loss of supervised fine-tuning on responses that are given.

    Its gradient is that of the cross-entropy with whoever wrote the responses: of KL(writer || p)
    in the mean over them. On the student's own samples its mean is 0.

    Args:
        inputs: Tokens with `logp`.

    Returns:
        (...) losses.
    """
    return -sampled_logp(inputs)


def k2_loss(inputs: TokenInputs) -> Tensor:
    """Return k2 = r^2 / 2: its gradient r grad log p(y) estimates that of the reverse KL."""
    return log_ratio(sampled_logp(inputs), teacher_sampled_logp(inputs)).square() / 2


def k3_loss(inputs: TokenInputs) -> Tensor:
    """Return k3 = e^-r - 1 + r.

    Its value is unbiased for the reverse KL, but its gradient (1 - e^-r) grad log p(y) estimates
    that of the forward KL(teacher || student).

    Args:
        inputs: Tokens with `logp`.

    Returns:
        (...) losses.
    """
    r = log_ratio(sampled_logp(inputs), teacher_sampled_logp(inputs))
    return torch.expm1(-r) + r


@dataclass(frozen=True, kw_only=True)
class Form:
    """A local surrogate and its declared properties."""

    surrogate: Callable[..., Tensor]
    """Function of TokenInputs, of `limit` where it is clippable, and of `beta` where it is a
    mixture.
    """
    reads_sample: bool = False
    """Whether it reads both models' log-probability of the sampled token."""
    likelihood: bool = False
    """Whether it is the likelihood of the tokens: it reads the student's log-probability of them
    and no teacher, and is right whoever wrote them.
    """
    clippable: bool = False
    """Whether its log-ratios can be clipped with the keyword argument `limit`."""
    renormalises: bool = False
    """Whether adding a constant to all log-probabilities of a position leaves it unchanged."""
    mixture: bool = False
    """Whether it takes the keyword argument `beta`."""


NO_FORM = Form(surrogate=no_loss, renormalises=True)


# --- access to the inputs -----------------------------------------------------------------------


def support_log_probs(inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of both models on the support.

    An absent id has probability 0 under both models and passes no gradient, whatever its entries
    are.

    Args:
        inputs: Tokens with a support.

    Returns:
        (..., K) of the student, with gradient, and (..., K) of the teacher.

    Raises:
        InvalidInput: There is no support.
    """
    if inputs.support_logp is None or inputs.teacher_support_logp is None:
        raise InvalidInput(
            "this objective compares both models on a support, but support_logp or "
            "teacher_support_logp is None; score the batch with the objective's support"
        )
    student_logp, teacher_logp = inputs.support_logp, inputs.teacher_support_logp.detach()
    if inputs.present is None:
        return student_logp, teacher_logp
    return _fill_absent(inputs.present, student_logp), _fill_absent(inputs.present, teacher_logp)


def _fill_absent(present: Tensor, logp: Tensor) -> Tensor:
    """Replace log-probabilities of absent ids by a value of probability 0."""
    return torch.where(present, logp, torch.full_like(logp, _ABSENT_LOGP))


def _tail(inputs: TokenInputs) -> Tensor:
    """Return the sampled token's cost times its score where it lies outside S."""
    logp = sampled_logp(inputs)
    cost = log_ratio(logp, teacher_sampled_logp(inputs))
    return score_function(logp, torch.where(inside_support(inputs), torch.zeros_like(cost), cost))


def sampled_logp(inputs: TokenInputs) -> Tensor:
    """Return (...) log p(y), with gradient.

    Args:
        inputs: Tokens with `logp`.

    Returns:
        (...) log-probabilities of the sampled tokens.

    Raises:
        InvalidInput: `logp` is missing.
    """
    if inputs.logp is None:
        raise InvalidInput(
            "this objective reads the sampled token's log-probability, but logp is None; pass it"
        )
    return inputs.logp


def inside_support(inputs: TokenInputs) -> Tensor:
    """Return (...) bool, whether the sampled token is one of the support ids.

    Args:
        inputs: Tokens with `inside`.

    Returns:
        (...) bool.

    Raises:
        InvalidInput: `inside` is missing.
    """
    if inputs.inside is None:
        raise InvalidInput(
            "this objective needs to know whether the token is in the support, but inside is None; "
            "pass it"
        )
    return inputs.inside


def _log_tail_mass(logp: Tensor) -> Tensor:
    """Return the (..., 1) log of the mass outside (..., K) ids, clamped to one rounding error."""
    inside = logp.logsumexp(-1, keepdim=True).exp()
    return torch.log1p(-inside.clamp(max=1 - torch.finfo(logp.dtype).eps))
