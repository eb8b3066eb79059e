"""Costs to go and baselines over other responses, shared by training and the gradient probe.

A baseline is subtracted from the credit of a token. It leaves the mean gradient unchanged if it
depends neither on the token nor on anything that the token causes, including the length of the same
response; the score of a sampled token then averages to 0 against it at every prefix.

Shapes: B responses, T positions, "..." further axes of a credit, such as discounts.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput


def immediate(cost: Tensor, sampled: Tensor) -> Tensor:
    """Return each token's own cost. Unbiased for the KL with frozen prefixes."""
    return cost * sampled


def to_go(cost: Tensor, sampled: Tensor) -> Tensor:
    """Return each token's own and all later costs: G_t = sum_{u >= t} r_u.

    Unbiased for the gradient of the sequence KL (past costs drop out: E[score | prefix] = 0).

    Args:
        cost: (B, T) r.
        sampled: (B, T) bool.

    Returns:
        (B, T).
    """
    return (cost * sampled).flip(1).cumsum(1).flip(1) * sampled


def discounted(cost: Tensor, sampled: Tensor, gamma: float) -> Tensor:
    """Return G_t = r_t + gamma G_{t+1} over the sampled tokens, supervised or not.

    Every sampled token advances gamma. Positions at which nothing was sampled, such as environment
    text between turns, do not: gamma counts the student's own decisions. gamma = 0 is `immediate`,
    gamma = 1 is `to_go`; between them the mean field is not the gradient of any function. (arXiv
    2603.25562, eq. 3.)

    Args:
        cost: (B, T) r.
        sampled: (B, T) bool.
        gamma: Discount in [0, 1].

    Returns:
        (B, T).

    Raises:
        InvalidInput: gamma is outside [0, 1].
    """
    check_gamma(gamma)
    if gamma == 0:
        return immediate(cost, sampled)
    if gamma == 1:
        return to_go(cost, sampled)
    running = torch.zeros_like(cost[:, 0])
    columns = []
    for t in reversed(range(cost.shape[1])):
        running = torch.where(sampled[:, t], cost[:, t] + gamma * running, running)
        columns.append(running)
    return torch.stack(columns[::-1], 1) * sampled


def check_gamma(gamma: float) -> None:
    """Raise InvalidInput unless gamma is in [0, 1]."""
    if not 0 <= gamma <= 1:
        raise InvalidInput(f"gamma is {gamma}; the discount must be in [0, 1]")


def position_mean(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Return the mean credit at position t of the responses to *other prompts* alive there.

    A response is alive where it has a sampled token; the mean is 0 where no other prompt has one.
    Unbiased: it does not depend on the responses of the same prompt, so neither on the token itself
    nor on the length of its response. Removes the cubic growth of the variance; introduces a
    correlation of O(1/C^2) between prompts.

    Args:
        batch: Scored rollouts.
        credit: (B, T, ...).

    Returns:
        (B, T, ...), the same for all responses to a prompt.

    Raises:
        InvalidInput: There is only one prompt.
    """
    prompts, group = batch.prompt.unique(return_inverse=True)
    if len(prompts) < 2:
        raise InvalidInput(
            "the baseline position_mean averages over other prompts, but the batch has only 1; use "
            "2 or more prompts, or another baseline"
        )
    alive = batch.sampled.to(credit.dtype).view(*batch.sampled.shape, *[1] * (credit.dim() - 2))
    total, count = (
        values.sum(0) - group_totals(values, group) for values in (credit * alive, alive)
    )
    return total / count.clamp(min=1)


def leave_one_out(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Return the mean credit at position t of the *other* rollouts of the prompt.

    An ended rollout counts as 0. Unbiased: it does not depend on the response itself. Counting
    ended rollouts as 0, their actual remaining cost, keeps the number of others the same at every
    position. A sampled token that is not supervised counts with the credit that it would have.

    Args:
        batch: Scored rollouts.
        credit: (B, T, ...).

    Returns:
        (B, T, ...).

    Raises:
        InvalidInput: A prompt has only one rollout.
    """
    group, size = prompt_groups(batch, "leave-one-out baseline")
    broadcast_shape = (len(batch), *[1] * (credit.dim() - 1))
    sampled_credit = credit * batch.sampled.view(*batch.sampled.shape, *[1] * (credit.dim() - 2))
    return (group_totals(sampled_credit, group) - sampled_credit) / (size - 1).view(broadcast_shape)


def prompt_groups(batch: ScoredRollouts, purpose: str) -> tuple[Tensor, Tensor]:
    """Return each row's prompt index and the number of rollouts of its prompt.

    Args:
        batch: Scored rollouts.
        purpose: What needs the groups, for the error message.

    Returns:
        (B,) prompt index and (B,) number of rollouts, at least 2.

    Raises:
        InvalidInput: A prompt has only one rollout.
    """
    _, group, size = batch.prompt.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise InvalidInput(
            f"{int((size < 2).sum())} of {len(size)} prompts have a single rollout; the {purpose} "
            "needs at least 2 a prompt (group_size)"
        )
    return group, size[group]


def group_totals(x: Tensor, group: Tensor) -> Tensor:
    """Return, for each row, the sum of x (B, ...) over the rows of its group, (B, ...)."""
    total = torch.zeros_like(x).index_add_(0, group, x)
    return total[group]
