"""Credit: how the cost of a token is spread over the tokens that caused it, once per step.

Everything here is computed over the whole batch of an optimizer step and carries no gradient:
discounted costs to go, the baselines that are subtracted from them, advantages of an outcome
reward, and the importance ratios for tokens that were not sampled from the student itself.

Shapes: B responses, T positions, G rollouts a prompt.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import Scored
from diagnostics.errors import InvalidInput

# --- costs to go --------------------------------------------------------------------------------

MASK_SCOPES: dict[str, str] = {
    "cost": "a masked token's cost is 0, for itself and in the credit of earlier tokens",
    "loss": "a masked token's cost stays in the credit of earlier tokens; its own loss alone goes",
}
"""What a mask takes away. Where it reads the prefix alone, "loss" estimates the gradient of the
costs of all sampled tokens, and "cost" that of the supervised tokens' costs, both by the student's
choices at the supervised positions. Where it reads the sampled token, neither is the gradient of a
function: the score of a token that may be masked has another mean than 0 at its prefix."""


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
# Unbiased only where E[score | prefix] = 0: the tokens must be sampled from the student itself.


def no_baseline(batch: Scored, credit: Tensor) -> Tensor:
    """Nothing is subtracted."""
    return torch.zeros_like(credit)


def position_mean(batch: Scored, credit: Tensor) -> Tensor:
    """Mean credit at position t of the responses that supervise it, the own one included.

    Removes the cubic growth of the variance; biased by O(1/B), since the own credit is in it.
    """
    alive = batch.mask.sum(0).clamp(min=1)
    return ((credit * batch.mask).sum(0) / alive).expand_as(credit)


def leave_one_out(batch: Scored, credit: Tensor) -> Tensor:
    """Mean credit at position t of the *other* rollouts of the prompt; an ended one counts as 0.

    Unbiased: it does not depend on the own tokens. Counting the ended as 0, which is what they
    still cost, keeps the number of others the same at every position. A sampled token that is
    not supervised counts with the credit that it would have.

    Raises:
      ValueError: a prompt has one rollout only.
    """
    group, size = _groups(batch, "leave-one-out baseline")
    own = credit * batch.sampled
    return (_totals(own, group) - own) / (size - 1)[:, None]


def local_kl(batch: Scored, credit: Tensor) -> Tensor:
    """KL(student || teacher) at the prefix: the mean of the token's own cost (vOPD, 2605.07865)."""
    return mean_cost(batch)


def given(batch: Scored, credit: Tensor) -> Tensor:
    """The batch's own `baseline` column: a critic's estimate, or the exact one on tabular worlds.

    Raises:
      ValueError: the batch has none.
    """
    if batch.baseline is None:
        raise InvalidInput("the baseline 'given' needs a batch with a baseline column; it has none")
    return batch.baseline


BASELINES: dict[str, Callable[[Scored, Tensor], Tensor]] = {
    "none": no_baseline,
    "position_mean": position_mean,
    "leave_one_out": leave_one_out,
    "local_kl": local_kl,
    "given": given,
}

# --- advantages of the outcome reward -----------------------------------------------------------


def leave_one_out_reward(batch: Scored) -> Tensor:
    """(B,) reward minus the mean reward of the *other* rollouts of the prompt.

    Its score-function term is unbiased for the gradient of the expected reward.
    """
    group, size, reward = _rewards(batch)
    others = (_totals(reward, group) - reward) / (size - 1)
    return reward - others


def group_mean_reward(batch: Scored) -> Tensor:
    """(B,) reward minus the prompt's mean, the own one included: (G - 1)/G of the unbiased one."""
    group, size, reward = _rewards(batch)
    return reward - _totals(reward, group) / size


def group_normal_reward(batch: Scored) -> Tensor:
    """(B,) the same divided by the prompt's standard deviation; 0 where all rewards are equal.

    GRPO's (arXiv 2402.03300, 4.1.2), with divisor G - 1. Not the gradient of the mean reward:
    prompts weigh the more the more equal their rewards are.
    """
    group, size, _ = _rewards(batch)
    away = group_mean_reward(batch)
    spread = (_totals(away.square(), group) / (size - 1)).sqrt()
    return torch.where(spread > 1e-6, away / spread.clamp(min=1e-6), torch.zeros_like(away))


ADVANTAGES: dict[str, Callable[[Scored], Tensor]] = {
    "leave_one_out": leave_one_out_reward,
    "group_mean": group_mean_reward,
    "group_normal": group_normal_reward,
}


def outcome_cost(batch: Scored, weight: float, advantage: Callable[[Scored], Tensor]) -> Tensor:
    """(B, T) -weight * advantage of the response, the same at all its tokens and not discounted.

    Added to the credit, it turns J into J - weight * E[reward].
    """
    return (-weight * advantage(batch))[:, None] * batch.sampled


def _rewards(batch: Scored) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) group, (B,) size of the group, (B,) reward."""
    missing = int(batch.reward.isnan().sum())
    if missing:
        raise InvalidInput(
            f"{missing} of {len(batch)} responses have no reward (NaN); an outcome term needs a "
            "graded task, or outcome = 0"
        )
    group, size = _groups(batch, "advantage of an outcome reward")
    return group, size, batch.reward.to(batch.student_logp.dtype)


def _groups(batch: Scored, what: str) -> tuple[Tensor, Tensor]:
    """(B,) the prompt's number and (B,) how many rollouts it has, at least 2."""
    _, group, size = batch.prompt.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise InvalidInput(
            f"{int((size < 2).sum())} of {len(size)} prompts have a single rollout; the {what} "
            "needs at least 2 a prompt (group_size)"
        )
    return group, size[group]


def _totals(x: Tensor, group: Tensor) -> Tensor:
    """(B, ...) for each row the sum of x (B, ...) over the rows of its group."""
    total = torch.zeros_like(x).index_add_(0, group, x)
    return total[group]


# --- costs --------------------------------------------------------------------------------------


def log_ratio(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """k1 = log student - log teacher of the sampled token.

    Unbiased for KL(student || teacher) at the prefix, of either sign.
    """
    return student_logp - teacher_logp


def sampled_cost(batch: Scored) -> Tensor:
    """r, the log-ratio of the sampled token, (B, T)."""
    return log_ratio(batch.student_logp, batch.teacher_logp).detach()


def clipped_cost(batch: Scored, limit: float) -> Tensor:
    """r held within -limit and limit nats, (B, T).

    Tames single tokens of which a model is certain and the other not. Biased: the mean is that of
    the clipped ratio, sum_v p clip(log p/q) grad log p, so that rare tokens which either model all
    but rules out pull with at most `limit`. No bias where no token goes that far.
    """
    return sampled_cost(batch).clamp(-limit, limit)


def mean_cost(batch: Scored) -> Tensor:
    """K = KL(student || teacher) at the prefix, the mean of r over the token, (B, T).

    Raises:
      ValueError: the batch has no prefix functionals.
    """
    if batch.prefix is None:
        raise InvalidInput(
            "the local KL needs whole next-token distributions; score the batch with prefix "
            "functionals (diagnostics.prefix)"
        )
    return batch.prefix.reverse_kl.detach()


def no_cost(batch: Scored) -> Tensor:
    """A local objective has no score-function part."""
    return torch.zeros_like(batch.student_logp)


# --- importance ratios --------------------------------------------------------------------------


def no_ratio(batch: Scored) -> Tensor:
    """Every token counts once; right only if the sampler is the student."""
    return torch.ones_like(batch.student_logp)


def token_ratio(batch: Scored) -> Tensor:
    """student(y | prefix) / sampler(y | prefix): repairs the token's own term, not the prefixes.

    At gamma = 0 the mean is the local gradient over the *sampler's* prefixes. Tokens that the
    sampler never draws (top-p) stay missing.
    """
    return (batch.student_logp - batch.sampler_logp).detach().exp()


def sequence_ratio(batch: Scored) -> Tensor:
    """The product of the ratios of all sampled tokens of the response, (B, T) constant along T.

    Also of those that are not supervised: how much too often the sampler produces a response does
    not depend on where the loss is taken. Unbiased where the sampler draws every token that the
    student can; its variance grows exponentially with the length.
    """
    away = (batch.student_logp - batch.sampler_logp).detach() * batch.sampled
    away = away.sum(1, keepdim=True)
    return away.exp().expand_as(batch.student_logp)


RATIOS: dict[str, Callable[[Scored], Tensor]] = {
    "none": no_ratio,
    "token": token_ratio,
    "sequence": sequence_ratio,
}
