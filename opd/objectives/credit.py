"""Credit: how token costs are assigned to the tokens that caused them, once per step.

Everything is computed over the whole batch of an optimizer step and carries no gradient: discounted
costs to go, baselines (those shared with the gradient probe are in `diagnostics.gradients.credit`),
advantages of a reward, and importance ratios for tokens that were not sampled from the student.

Shapes: B responses, T positions, G rollouts per prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import DATASET, ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.gradients.credit import check_gamma as check_gamma
from diagnostics.gradients.credit import discounted as discounted
from diagnostics.gradients.credit import group_totals, leave_one_out, position_mean, prompt_groups
from diagnostics.gradients.credit import immediate as immediate
from diagnostics.gradients.credit import to_go as to_go
from diagnostics.missing import missing_fields

MASK_SCOPES: dict[str, str] = {
    "cost": "a masked token's cost is 0, for itself and in the credit of earlier tokens",
    "loss": "only a masked token's loss is removed; its cost stays in the credit of earlier tokens",
}
"""What a mask removes. If the mask depends on the prefix only, "loss" estimates the gradient of the
costs of all sampled tokens and "cost" that of the supervised tokens' costs, both through the
student's choices at supervised positions. If the mask depends on the sampled token, neither is
the gradient of a function: the score of a token that may be masked does not have mean 0 at its
prefix.
"""


# --- baselines ----------------------------------------------------------------------------------
# Unbiased only where E[score | prefix] = 0: the tokens must be sampled from the student itself.


def no_baseline(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Return a baseline of zero."""
    return torch.zeros_like(credit)


def local_kl(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Return KL(student || teacher) at the prefix, the mean of the own cost (vOPD, 2605.07865)."""
    return mean_cost(batch)


def batch_baseline(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Return the batch's `baseline` column: a critic's estimate, or the exact one on tabular MDPs.

    Args:
        batch: Scored rollouts with a baseline column.
        credit: (B, T), unused.

    Returns:
        (B, T) baseline.

    Raises:
        InvalidInput: The batch has no baseline column.
    """
    if batch.baseline is None:
        raise InvalidInput(
            "baseline 'given' needs a batch with a baseline column, but this batch has none"
        )
    return batch.baseline


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline of the credit, and what it reads."""

    function: Callable[[ScoredRollouts, Tensor], Tensor]
    """(batch, credit) -> (B, T) baseline."""
    distributions: bool = False
    """Whether it reads statistics of whole next-token distributions."""
    whole_groups: bool = False
    """Whether it averages the credit of other responses of the step."""


NO_BASELINE = Baseline(function=no_baseline)

BASELINES: dict[str, Baseline] = {
    "none": NO_BASELINE,
    "position_mean": Baseline(function=position_mean, whole_groups=True),
    "leave_one_out": Baseline(function=leave_one_out, whole_groups=True),
    "local_kl": Baseline(function=local_kl, distributions=True),
    "given": Baseline(function=batch_baseline),
}

# --- advantages of the reward -------------------------------------------------------------------


def leave_one_out_reward(batch: ScoredRollouts) -> Tensor:
    """Return (B,) the reward minus the mean reward of the *other* rollouts of the prompt.

    Its score-function term is unbiased for the gradient of the expected reward.

    Args:
        batch: Scored rollouts with rewards, at least two per prompt.

    Returns:
        (B,) advantages.
    """
    group, size, reward = _rewards(batch)
    mean_of_others = (group_totals(reward, group) - reward) / (size - 1)
    return reward - mean_of_others


def group_mean_reward(batch: ScoredRollouts) -> Tensor:
    """Return (B,) the reward minus the mean of its whole group: (G - 1)/G of the unbiased one."""
    group, size, reward = _rewards(batch)
    return reward - group_totals(reward, group) / size


def group_normal_reward(batch: ScoredRollouts) -> Tensor:
    """Return (B,) the group-mean advantage divided by the group's standard deviation.

    GRPO's advantage (arXiv 2402.03300, 4.1.2) with divisor G - 1. Its gradient is not that of the
    mean reward: prompts with nearly equal rewards get a larger weight.

    Args:
        batch: Scored rollouts with rewards, at least two per prompt.

    Returns:
        (B,) advantages, 0 where all rewards of a prompt are equal.
    """
    group, size, _ = _rewards(batch)
    deviation = group_mean_reward(batch)
    std = (group_totals(deviation.square(), group) / (size - 1)).sqrt()
    return torch.where(std > 1e-6, deviation / std.clamp(min=1e-6), torch.zeros_like(deviation))


ADVANTAGES: dict[str, Callable[[ScoredRollouts], Tensor]] = {
    "leave_one_out": leave_one_out_reward,
    "group_mean": group_mean_reward,
    "group_normal": group_normal_reward,
}


def reward_cost(
    batch: ScoredRollouts, weight: float, advantage: Callable[[ScoredRollouts], Tensor]
) -> Tensor:
    """Return (B, T) -weight * advantage of the response at all of its tokens, undiscounted.

    Adding it to the credit turns J into J - weight * E[reward].

    Args:
        batch: Scored rollouts with rewards.
        weight: Weight of the reward.
        advantage: Function of the batch, one of ADVANTAGES.

    Returns:
        (B, T) costs, 0 where nothing was sampled.
    """
    return (-weight * advantage(batch))[:, None] * batch.sampled


def _rewards(batch: ScoredRollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Return group (B,), group size (B,) and reward (B,)."""
    num_missing = int(batch.reward.isnan().sum())
    if num_missing:
        raise InvalidInput(
            f"{num_missing} of {len(batch)} responses have no reward (NaN); use a graded task, or "
            "set reward_weight to 0"
        )
    group, size = prompt_groups(batch, "advantage of an outcome reward")
    return group, size, batch.reward.to(batch.student_logp.dtype)


# --- costs --------------------------------------------------------------------------------------


def log_ratio(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Return k1 = log student - log teacher of the sampled token.

    It is unbiased for KL(student || teacher) at the prefix and may have either sign.

    Args:
        student_logp: (...) log-probabilities.
        teacher_logp: (...) log-probabilities.

    Returns:
        (...) differences in nats.
    """
    return student_logp - teacher_logp


def sampled_cost(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) r, the log-ratio of the sampled token."""
    return log_ratio(batch.student_logp, batch.teacher_logp).detach()


def clipped_cost(batch: ScoredRollouts, limit: float) -> Tensor:
    """Return (B, T) r clipped to [-limit, limit] nats.

    This bounds the influence of single tokens on which one model is certain and the other is not.
    It is biased: the mean is sum_v p clip(log p/q) grad log p, so that rare tokens which either
    model practically rules out contribute at most `limit`. There is no bias where no ratio exceeds
    the limit.

    Args:
        batch: Scored rollouts.
        limit: Largest absolute log-ratio in nats.

    Returns:
        (B, T) costs.
    """
    return sampled_cost(batch).clamp(-limit, limit)


def mean_cost(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) K = KL(student || teacher) at the prefix, the mean of r over the token.

    Args:
        batch: Scored rollouts with distribution statistics.

    Returns:
        (B, T) costs.

    Raises:
        InvalidInput: The batch has no distribution statistics.
    """
    if batch.prefix is None:
        raise InvalidInput(
            "the local KL needs distribution statistics; score the batch with `score`, "
            "which adds them (diagnostics.core.distribution_stats)"
        )
    return batch.prefix.reverse_kl.detach()


def no_cost(batch: ScoredRollouts) -> Tensor:
    """Return a cost of zero, that of a local objective, which has no score-function part."""
    return torch.zeros_like(batch.student_logp)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost of tokens, and what it reads."""

    function: Callable[[ScoredRollouts], Tensor]
    """batch -> (B, T) costs."""
    sampled: bool = False
    """Whether it is the log-ratio of the sampled token, which can be clipped."""
    distributions: bool = False
    """Whether it reads statistics of whole next-token distributions."""

    @property
    def is_zero(self) -> bool:
        """Whether it reads nothing and is 0."""
        return not (self.sampled or self.distributions)


NO_COST = Cost(function=no_cost)
SAMPLED_COST = Cost(function=sampled_cost, sampled=True)
MEAN_COST = Cost(function=mean_cost, distributions=True)


# --- importance ratios --------------------------------------------------------------------------


def no_ratio(batch: ScoredRollouts) -> Tensor:
    """Return a ratio of 1 for every token; correct only if the sampler is the student."""
    return torch.ones_like(batch.student_logp)


def sampler_log_ratio(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) log student - log sampler of the sampled tokens, constant.

    Args:
        batch: Scored rollouts with the sampler's log-probabilities.

    Returns:
        The log-ratios.

    Raises:
        InvalidInput: Some responses come from a dataset, of which no sampler is known.
    """
    given = batch.origin is not None and bool((batch.origin == DATASET).any())
    if given or "sampler_logp" in missing_fields(batch):
        raise InvalidInput(
            "an importance ratio compares the student with the sampler of a response, which is not "
            "known of responses from a dataset; set ratio to none"
        )
    return (batch.student_logp - batch.sampler_logp).detach()


def token_ratio(batch: ScoredRollouts) -> Tensor:
    """Return student(y | prefix) / sampler(y | prefix), correcting the token, not the prefixes.

    At gamma = 0 the mean is the local gradient over the *sampler's* prefixes. Tokens that the
    sampler never draws (top-p) remain missing.

    Args:
        batch: Scored rollouts with the sampler's log-probabilities.

    Returns:
        (B, T) ratios.
    """
    return sampler_log_ratio(batch).exp()


def sequence_ratio(batch: ScoredRollouts) -> Tensor:
    """Return the product of the token ratios of a response, constant along T.

    The product includes tokens that are not supervised, since how often the sampler produces a
    response does not depend on the mask. It is unbiased if the sampler can draw every token that
    the student can; its variance grows exponentially with the length.

    Args:
        batch: Scored rollouts with the sampler's log-probabilities.

    Returns:
        (B, T) ratios.
    """
    log_weight = sampler_log_ratio(batch) * batch.sampled
    log_weight = log_weight.sum(1, keepdim=True)
    return log_weight.exp().expand_as(batch.student_logp)


RATIOS: dict[str, Callable[[ScoredRollouts], Tensor]] = {
    "none": no_ratio,
    "token": token_ratio,
    "sequence": sequence_ratio,
}
