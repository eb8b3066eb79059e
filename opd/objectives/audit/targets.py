"""Exact gradients of what a loss may estimate, by the student's table of logits.

p is the student, q the teacher, S a support of K ids. "Token" targets freeze the distribution of
the prefixes; the "sequence" target does not.

Shapes: N prefixes, R responses of a world, T positions, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from opd.objectives.audit.worlds import World

LocalLoss = Callable[[Tensor, Tensor], Tensor]
"""Function of (N, V) log-probabilities of student and teacher to (N,) losses of prefixes."""
Gradient = Callable[[World, Tensor, Tensor | None], Tensor]
"""Function of world, (N, V) student's logits and (N, V) sampler's logits to an (N, V) gradient."""


@dataclass(frozen=True)
class Target:
    """Something that a loss may estimate the gradient of."""

    name: str
    """Name on the card."""
    gradient: Gradient
    """Its exact gradient."""
    composition: str | None = None
    """Our least noisy estimator of it, NAME[,setting=value...]; None if we have none."""
    minimum_is_teacher: bool = True
    """Whether the student that equals the teacher is the only one that minimises it."""


@lru_cache(maxsize=1 << 14)
def exact_gradient(target: Target, world: World) -> Tensor:
    """Return the gradient of a target at a world's student, on policy; it is kept for later calls.

    Args:
        target: The target.
        world: The world.

    Returns:
        (N, V) gradient, not to be changed.
    """
    return target.gradient(world, world.student, None)


def local_gradient(
    loss: LocalLoss, world: World, student: Tensor, sampler: Tensor | None
) -> Tensor:
    """Return the gradient of sum over prefixes of visits times a local loss, visits frozen.

    Args:
        loss: The local loss.
        world: The world.
        student: (N, V) logits.
        sampler: (N, V) logits of the policy that visits the prefixes; the student's if None.

    Returns:
        (N, V) gradient.
    """
    table = student.detach().clone().requires_grad_()
    visits = world.visits(world.probabilities(student if sampler is None else sampler)).detach()
    losses = loss(table.log_softmax(-1), world.teacher.log_softmax(-1))
    (gradient,) = torch.autograd.grad((visits * losses).sum(), table)
    return gradient


def sequence_gradient(world: World, student: Tensor, sampler: Tensor | None) -> Tensor:
    """Return the gradient of the KL of the student's from the teacher's distribution of responses.

    Args:
        world: The world.
        student: (N, V) logits.
        sampler: Unused: the gradient does not depend on who samples.

    Returns:
        (N, V) gradient.
    """
    table = student.detach().clone().requires_grad_()
    logp = world.token_logp(table).sum(1)
    cost = logp - world.token_logp(world.teacher).sum(1)
    (gradient,) = torch.autograd.grad((logp.exp() * cost).sum() / world.num_prompts, table)
    return gradient


def score_gradient(world: World, student: Tensor, probabilities: Tensor, credit: Tensor) -> Tensor:
    """Return sum over responses of probability times sum_t credit_t grad log p(y_t).

    Args:
        world: The world.
        student: (N, V) logits.
        probabilities: (R,) probability of each response.
        credit: (R, T) credit of each token.

    Returns:
        (N, V) gradient.
    """
    table = student.detach().clone().requires_grad_()
    weighted = probabilities[:, None] * credit * world.token_logp(table)
    (gradient,) = torch.autograd.grad(weighted.sum(), table)
    return gradient


def discounted_gradient(
    gamma: float, world: World, student: Tensor, sampler: Tensor | None
) -> Tensor:
    """Return the mean of sum_t (sum_{u >= t} gamma^(u-t) r_u) grad log p(y_t), r = log p - log q.

    Args:
        gamma: Discount.
        world: The world.
        student: (N, V) logits.
        sampler: (N, V) logits of the sampler; the student's if None.

    Returns:
        (N, V) gradient.
    """
    cost = world.token_logp(student) - world.token_logp(world.teacher)
    credit = torch.zeros_like(cost)
    later = torch.zeros_like(cost[:, 0])
    for t in reversed(range(cost.shape[1])):
        later = cost[:, t] + gamma * later
        credit[:, t] = later
    probabilities = world.probabilities(student if sampler is None else sampler)
    return score_gradient(world, student, probabilities, credit)


def reward_gradient(world: World, student: Tensor, sampler: Tensor | None) -> Tensor:
    """Return minus the gradient of the expected reward.

    Args:
        world: The world.
        student: (N, V) logits.
        sampler: Unused: the gradient does not depend on who samples.

    Returns:
        (N, V) gradient.
    """
    credit = -world.reward[:, None].expand(world.tokens.shape)
    return score_gradient(world, student, world.probabilities(student), credit)


# --- local losses -------------------------------------------------------------------------------


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q)."""
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(q || p), where a token of teacher probability 0 counts as 0."""
    return torch.where(q > -math.inf, q.exp() * (q.clamp(min=-1e9) - p), 0.0).sum(-1)


def jensen_shannon(beta: float, p: Tensor, q: Tensor) -> Tensor:
    """Return beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * forward_kl(m, q) + (1 - beta) * reverse_kl(p, m)


def on_support(bucket: bool, source: str, k: int, p: Tensor, q: Tensor) -> Tensor:
    """Return the reverse KL on K ids, renormalised, or with the rest as one more event.

    Args:
        bucket: Whether the rest is one event; otherwise both models are renormalised on S.
        source: "teacher" or "student", whose K most probable ids are S.
        k: K.
        p: (N, V) log-probabilities of the student.
        q: (N, V) log-probabilities of the teacher.

    Returns:
        (N,) losses.
    """
    ids = (q if source == "teacher" else p.detach()).topk(k, -1).indices
    p_s, q_s = p.gather(-1, ids), q.gather(-1, ids)
    if not bucket:
        return reverse_kl(p_s.log_softmax(-1), q_s.log_softmax(-1))
    tail = torch.ones_like(p, dtype=torch.bool).scatter(-1, ids, False)

    def with_tail(head: Tensor, logp: Tensor) -> Tensor:
        rest = torch.where(tail, logp, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([head, rest], -1)

    return reverse_kl(with_tail(p_s, p), with_tail(q_s, q))


# --- the list -----------------------------------------------------------------------------------

SEQUENCE = Target("sequence_reverse_kl", sequence_gradient, "full_reverse_kl,gamma=1")
TOKEN_REVERSE = Target("token_reverse_kl", partial(local_gradient, reverse_kl), "full_reverse_kl")
TOKEN_FORWARD = Target("token_forward_kl", partial(local_gradient, forward_kl), "full_forward_kl")
REWARD = Target("expected_reward", reward_gradient, minimum_is_teacher=False)
BASIC = (TOKEN_REVERSE, SEQUENCE, TOKEN_FORWARD, REWARD)
"""Targets without a parameter, the plainest first."""


@lru_cache(maxsize=64)
def jsd_target(beta: float) -> Target:
    """Return the generalised Jensen-Shannon divergence on frozen prefixes."""
    gradient = partial(local_gradient, partial(jensen_shannon, beta))
    return Target(f"token_jsd({beta:.3g})", gradient, f"full_jsd,beta={beta:.6g}")


@lru_cache(maxsize=64)
def discounted_target(gamma: float) -> Target:
    """Return the family between token and sequence, whose means are no function's gradient."""
    name = f"discounted_reverse_kl({gamma:.3g})"
    composition = f"full_reverse_kl,gamma={gamma:.6g}"
    return Target(name, partial(discounted_gradient, gamma), composition)


@lru_cache(maxsize=8)
def support_targets(vocabulary: int) -> list[Target]:
    """Return the reverse KL on a support, for every K below the vocabulary and both sources."""
    return [
        Target(
            f"topk_reverse_kl({form}, {source})",
            partial(local_gradient, partial(on_support, form == "bucket", source, k)),
            f"{source}_topk{'' if form == 'renormalised' else '_bucket'},support_k={k}",
            minimum_is_teacher=False,
        )
        for form in ("renormalised", "bucket")
        for source in ("teacher", "student")
        for k in range(1 if form == "bucket" else 2, vocabulary)
    ]
