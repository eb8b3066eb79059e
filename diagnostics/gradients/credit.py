"""Costs to go, and baselines over other responses: what training and the gradient probe share.

A baseline is subtracted from the credit of a token. It leaves the mean gradient as it is if it does
not depend on the token, nor on anything that the token brings about, the length of the own response
included; the score of a sampled token then averages to 0 against it at every prefix.

Shapes: B responses, T positions, "..." further axes of a credit, such as discounts.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput

# --- costs to go --------------------------------------------------------------------------------


def immediate(cost: Tensor, sampled: Tensor) -> Tensor:
    """A token answers for its own cost alone. Unbiased for the KL with frozen prefixes."""
    return cost * sampled


def to_go(cost: Tensor, sampled: Tensor) -> Tensor:
    """A token answers for its own and all later costs: G_t = sum_{u >= t} r_u.

    Unbiased for the gradient of the sequence KL (past costs drop: E[score | prefix] = 0).
    """
    return (cost * sampled).flip(1).cumsum(1).flip(1) * sampled


def discounted(cost: Tensor, sampled: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over the sampled tokens, whether they are supervised or not.

    Every sampled token advances gamma. Positions at which nothing was sampled, an environment's
    text between turns, do not: gamma counts the student's own choices. gamma = 0 is `immediate`,
    gamma = 1 is `to_go`; between them the mean field is not the gradient of any function. (arXiv
    2603.25562, eq. 3.)

    Raises:
      ValueError: gamma is outside [0, 1].
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
    if not 0 <= gamma <= 1:
        raise InvalidInput(f"gamma is {gamma}; the discount must lie in [0, 1]")


# --- baselines ----------------------------------------------------------------------------------


def position_mean(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Mean credit at position t of the responses to *other prompts* that are alive there.

    A response is alive where it has a sampled token; 0 where no other prompt has one. Unbiased:
    nothing in it depends on the own prompt's responses, so neither on the own tokens nor on the own
    length. Removes the cubic growth of the variance; ties prompts together by O(1/C^2).

    Args:
      credit: (B, T, ...).

    Returns:
      (B, T, ...), the same for all responses to a prompt.

    Raises:
      ValueError: there is one prompt only.
    """
    prompts, group = batch.prompt.unique(return_inverse=True)
    if len(prompts) < 2:
        raise InvalidInput(
            "the baseline position_mean is the mean over other prompts, and the batch has 1; give "
            "it 2 or more, or use another baseline"
        )
    alive = batch.sampled.to(credit.dtype).view(*batch.sampled.shape, *[1] * (credit.dim() - 2))
    total, count = (x.sum(0) - group_totals(x, group) for x in (credit * alive, alive))
    return total / count.clamp(min=1)


def leave_one_out(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Mean credit at position t of the *other* rollouts of the prompt; an ended one counts as 0.

    Unbiased: it does not depend on the own tokens. Counting the ended as 0, which is what they
    still cost, keeps the number of others the same at every position. A sampled token that is
    not supervised counts with the credit that it would have.

    Args:
      credit: (B, T, ...).

    Raises:
      ValueError: a prompt has one rollout only.
    """
    group, size = groups(batch, "leave-one-out baseline")
    wide = (len(batch), *[1] * (credit.dim() - 1))
    own = credit * batch.sampled.view(*batch.sampled.shape, *[1] * (credit.dim() - 2))
    return (group_totals(own, group) - own) / (size - 1).view(wide)


def groups(batch: ScoredRollouts, purpose: str) -> tuple[Tensor, Tensor]:
    """(B,) the prompt's number and (B,) how many rollouts it has, at least 2.

    Raises:
      ValueError: a prompt has one; names the purpose.
    """
    _, group, size = batch.prompt.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise InvalidInput(
            f"{int((size < 2).sum())} of {len(size)} prompts have a single rollout; the {purpose} "
            "needs at least 2 a prompt (group_size)"
        )
    return group, size[group]


def group_totals(x: Tensor, group: Tensor) -> Tensor:
    """(B, ...) for each row the sum of x (B, ...) over the rows of its group."""
    total = torch.zeros_like(x).index_add_(0, group, x)
    return total[group]
