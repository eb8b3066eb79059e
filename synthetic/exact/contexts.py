"""What a student without the context can learn from a teacher with it, in closed form.

p is the student, q_c the teacher that reads context c, drawn from the prior pi; s is a prefix. On
the student's prefixes c and s are independent, because the student never read c; on the teacher's
they are not, and the posterior w(c | s) of the context is proportional to pi(c) q_c(s).

Shapes: C contexts, S prefixes, A actions, T steps. Everything is float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.exact import moments
from synthetic.worlds.contexts import ContextWorld

# --- prefixes -----------------------------------------------------------------------------------


def prefix_probabilities(world: ContextWorld, logp: Tensor) -> Tensor:
    """Return the probability that a response begins with a prefix.

    Args:
        world: The world.
        logp: (..., S, A) log-probabilities of a policy, or of several.

    Returns:
        (..., S) probabilities; those of one length sum to 1.
    """
    probabilities = [torch.ones_like(logp[..., :1, 0])]
    for level in world.levels[:-1]:
        step = probabilities[-1][..., None] * logp[..., level, :].exp()
        probabilities.append(step.flatten(-2))
    return torch.cat(probabilities, -1)


def response_probabilities(world: ContextWorld, logp: Tensor) -> Tensor:
    """Return the (..., A^T) probabilities of whole responses under policies (..., S, A)."""
    last = world.levels[-1]
    step = prefix_probabilities(world, logp)[..., last, None] * logp[..., last, :].exp()
    return step.flatten(-2)


def joint_on_student_prefixes(world: ContextWorld, student_logp: Tensor) -> Tensor:
    """Return (C, S) pi(c) p(s): the context of the teacher says nothing about the prefix."""
    return world.prior[:, None] * prefix_probabilities(world, student_logp)


def joint_on_teacher_prefixes(world: ContextWorld) -> Tensor:
    """Return (C, S) pi(c) q_c(s): the prefix was written by the teacher that read c."""
    return world.prior[:, None] * prefix_probabilities(world, world.teacher_logp)


def context_weights(joint: Tensor) -> Tensor:
    """Return (C, S) probabilities of the context given the prefix, from a joint (C, S)."""
    return joint / joint.sum(0)


def prior_weights(world: ContextWorld) -> Tensor:
    """Return (C, S) probabilities of the context given a prefix that the student wrote: the prior.

    Args:
        world: The world.

    Returns:
        (C, S) weights, the same at every prefix.
    """
    return world.prior[:, None].expand(world.teacher_logp.shape[:2])


# --- best students ------------------------------------------------------------------------------


def arithmetic_student(world: ContextWorld, weights: Tensor) -> Tensor:
    """Return the best student for the forward KL, sum_c w(c | s) q_c(a | s).

    With the prior as weights it is the best one on any prefixes that do not depend on the context;
    with the posterior it is the teacher's marginal over contexts, and generates its responses.

    Args:
        world: The world.
        weights: (C, S) probabilities of the context given the prefix.

    Returns:
        (S, A) log-probabilities.
    """
    return (weights[..., None] * world.teacher_logp.exp()).sum(0).log()


def geometric_student(world: ContextWorld, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the student at which the gamma family rests, and its remaining cost to go.

    p(a | s) = exp(sum_c pi(c) log q_c(a | s) - gamma V(sa) + V(s)), with V(s) = -log of the sum
    over a that normalises it, and V = 0 after the last token. gamma = 0: the geometric mixture at
    each prefix, with V the KL of that prefix that remains. gamma = 1: the geometric mixture of
    whole responses, which minimises the mean sequence KL; V of the empty prefix is its minimum.

    Args:
        world: The world.
        gamma: Discount of later costs, in [0, 1].

    Returns:
        (S, A) log-probabilities and (S,) V in nats.
    """
    log_mixture = torch.einsum("c,csa->sa", world.prior, world.teacher_logp)
    logp, value = torch.zeros_like(log_mixture), torch.zeros_like(log_mixture[:, 0])
    later = torch.zeros(world.num_actions**world.horizon, dtype=log_mixture.dtype)
    for level in reversed(world.levels):
        energy = log_mixture[level] - gamma * later.view(-1, world.num_actions)
        later = -energy.logsumexp(-1)
        logp[level], value[level] = energy + later[:, None], later
    return logp, value


# --- what remains -------------------------------------------------------------------------------


def reverse_kl(world: ContextWorld, student_logp: Tensor) -> Tensor:
    """Return (C, S) KL(p || q_c) at each prefix."""
    return (student_logp.exp() * (student_logp - world.teacher_logp)).sum(-1)


def forward_kl(world: ContextWorld, student_logp: Tensor) -> Tensor:
    """Return (C, S) KL(q_c || p) at each prefix."""
    return (world.teacher_logp.exp() * (world.teacher_logp - student_logp)).sum(-1)


def mean_sequence_kl(world: ContextWorld, student_logp: Tensor) -> Tensor:
    """Return () J, the mean over contexts of KL(p || q_c) of whole responses."""
    return (joint_on_student_prefixes(world, student_logp) * reverse_kl(world, student_logp)).sum()


def conditional_information(world: ContextWorld, joint: Tensor) -> Tensor:
    """Return () sum_t I(A_t; C | S_t), the mutual information of context and teacher's next token.

    From the definition, E log [P(c, a | s) / (P(c | s) P(a | s))], over c and s drawn from the
    joint and a from q_c. On the teacher's prefixes the sum is the mutual information I(Y; C) of
    context and whole response, by the chain rule, and at most the entropy of the context. On the
    student's it has no such bound: the prefix never tells the context.

    Args:
        world: The world.
        joint: (C, S) joint probability of context and prefix; those of one length sum to 1.

    Returns:
        () nats per response.
    """
    triple = joint[..., None] * world.teacher_logp.exp()
    prefix, context = joint.sum(0), context_weights(joint)
    token = triple.sum(0) / prefix[:, None]
    dependent = triple / prefix[:, None]
    independent = context[..., None] * token
    safe = torch.where(triple > 0, dependent / independent, torch.ones_like(triple))
    return (triple * safe.log()).sum()


def response_information(world: ContextWorld, student_logp: Tensor) -> Tensor:
    """Return () what the student's responses tell a reader about the context, in nats.

    E_{y ~ p} KL(w(. | y) || pi), with the posterior w(c | y) of a reader who takes the response for
    the teacher's. At most the entropy of the context; I(Y; C) for the teacher's own responses.

    Args:
        world: The world.
        student_logp: (S, A) log-probabilities.

    Returns:
        () nats per response.
    """
    teacher = response_probabilities(world, world.teacher_logp)
    joint = world.prior[:, None] * teacher
    posterior = joint / joint.sum(0)
    gain = torch.where(joint > 0, posterior * (posterior / world.prior[:, None]).log(), 0.0)
    return (response_probabilities(world, student_logp) * gain.sum(0)).sum()


def entropy(prior: Tensor) -> Tensor:
    """Return () the entropy of a distribution (C,) in nats."""
    return torch.special.entr(prior).sum()


# --- estimators ---------------------------------------------------------------------------------


def context_moments(
    world: ContextWorld,
    student_logp: Tensor,
    estimator: str | Sequence[str],
    gamma: float,
    k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the moments of a gradient estimate whose teacher reads a context drawn per response.

    By the law of total variance: the mean over contexts of what varies between responses, and the
    variance of the mean between contexts.

    Args:
        world: The world.
        student_logp: (S, A) log-probabilities.
        estimator: A name in `synthetic.estimators.ESTIMATORS`, or several names.
        gamma: Discount, 0 for a local estimator.
        k: Size of the support, for top-K objectives.

    Returns:
        The mean (S, A), the variance () within a context and the variance () between contexts.
        A sequence of estimators adds a leading axis to each.
    """
    mdp, weights = world.mdp, world.prior
    pairs = [
        moments.moments(mdp, student_logp, teacher, estimator, gamma, k=k)
        for teacher in world.teacher_logp
    ]
    means, variances = (torch.stack(x) for x in zip(*pairs, strict=True))
    mean = torch.einsum("c,c...->...", weights, means)
    between = weights @ (means - mean).square().sum((-1, -2))
    return mean, weights @ variances, between


def sequence_gradient(world: ContextWorld, student_logp: Tensor, gamma: float) -> Tensor:
    """Return the (S, A) expected gradient of the gamma family, a mean over contexts.

    Args:
        world: The world.
        student_logp: (S, A) log-probabilities.
        gamma: Discount; 1 gives the gradient of J.

    Returns:
        (S, A) gradient with respect to the student's logits.
    """
    if not 0 <= gamma <= 1:
        raise InvalidInput(f"gamma is {gamma}, expected a discount in [0, 1]")
    mdp = world.mdp
    gradients = [
        moments.expected_gradient(mdp, student_logp, teacher, gamma)
        for teacher in world.teacher_logp
    ]
    return torch.einsum("c,csa->sa", world.prior, torch.stack(gradients))
