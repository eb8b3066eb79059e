"""Credit: how the cost of a token is spread over the tokens that caused it, once per step.

Everything here is computed over the whole batch of an optimizer step and carries no gradient:
discounted costs to go and the baselines that are subtracted from them (those that the gradient
probe knows too are in `diagnostics.gradients.credit`), advantages of an outcome reward, and the importance
ratios for tokens that were not sampled from the student itself.

Shapes: B responses, T positions, G rollouts a prompt.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.gradients.credit import check_gamma as check_gamma
from diagnostics.gradients.credit import discounted as discounted
from diagnostics.gradients.credit import group_totals, groups, leave_one_out, position_mean
from diagnostics.gradients.credit import immediate as immediate
from diagnostics.gradients.credit import to_go as to_go

MASK_SCOPES: dict[str, str] = {
    "cost": "a masked token's cost is 0, for itself and in the credit of earlier tokens",
    "loss": "a masked token's cost stays in the credit of earlier tokens; its own loss alone goes",
}
"""What a mask takes away. Where it reads the prefix alone, "loss" estimates the gradient of the
costs of all sampled tokens, and "cost" that of the supervised tokens' costs, both by the student's
choices at the supervised positions. Where it reads the sampled token, neither is the gradient of a
function: the score of a token that may be masked has another mean than 0 at its prefix."""


# --- baselines ----------------------------------------------------------------------------------
# Unbiased only where E[score | prefix] = 0: the tokens must be sampled from the student itself.


def no_baseline(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Nothing is subtracted."""
    return torch.zeros_like(credit)


def local_kl(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """KL(student || teacher) at the prefix: the mean of the token's own cost (vOPD, 2605.07865)."""
    return mean_cost(batch)


def given(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """The batch's own `baseline` column: a critic's estimate, or the exact one on tabular worlds.

    Raises:
      ValueError: the batch has none.
    """
    if batch.baseline is None:
        raise InvalidInput("the baseline 'given' needs a batch with a baseline column; it has none")
    return batch.baseline


BASELINES: dict[str, Callable[[ScoredRollouts, Tensor], Tensor]] = {
    "none": no_baseline,
    "position_mean": position_mean,
    "leave_one_out": leave_one_out,
    "local_kl": local_kl,
    "given": given,
}

# --- advantages of the outcome reward -----------------------------------------------------------


def leave_one_out_reward(batch: ScoredRollouts) -> Tensor:
    """(B,) reward minus the mean reward of the *other* rollouts of the prompt.

    Its score-function term is unbiased for the gradient of the expected reward.
    """
    group, size, reward = _rewards(batch)
    others = (group_totals(reward, group) - reward) / (size - 1)
    return reward - others


def group_mean_reward(batch: ScoredRollouts) -> Tensor:
    """(B,) reward minus the prompt's mean, the own one included: (G - 1)/G of the unbiased one."""
    group, size, reward = _rewards(batch)
    return reward - group_totals(reward, group) / size


def group_normal_reward(batch: ScoredRollouts) -> Tensor:
    """(B,) the same divided by the prompt's standard deviation; 0 where all rewards are equal.

    GRPO's (arXiv 2402.03300, 4.1.2), with divisor G - 1. Not the gradient of the mean reward:
    prompts weigh the more the more equal their rewards are.
    """
    group, size, _ = _rewards(batch)
    away = group_mean_reward(batch)
    spread = (group_totals(away.square(), group) / (size - 1)).sqrt()
    return torch.where(spread > 1e-6, away / spread.clamp(min=1e-6), torch.zeros_like(away))


ADVANTAGES: dict[str, Callable[[ScoredRollouts], Tensor]] = {
    "leave_one_out": leave_one_out_reward,
    "group_mean": group_mean_reward,
    "group_normal": group_normal_reward,
}


def outcome_cost(
    batch: ScoredRollouts, weight: float, advantage: Callable[[ScoredRollouts], Tensor]
) -> Tensor:
    """(B, T) -weight * advantage of the response, the same at all its tokens and not discounted.

    Added to the credit, it turns J into J - weight * E[reward].
    """
    return (-weight * advantage(batch))[:, None] * batch.sampled


def _rewards(batch: ScoredRollouts) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) group, (B,) size of the group, (B,) reward."""
    missing = int(batch.reward.isnan().sum())
    if missing:
        raise InvalidInput(
            f"{missing} of {len(batch)} responses have no reward (NaN); an outcome term needs a "
            "graded task, or outcome = 0"
        )
    group, size = groups(batch, "advantage of an outcome reward")
    return group, size, batch.reward.to(batch.student_logp.dtype)


# --- costs --------------------------------------------------------------------------------------


def log_ratio(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """k1 = log student - log teacher of the sampled token.

    Unbiased for KL(student || teacher) at the prefix, of either sign.
    """
    return student_logp - teacher_logp


def sampled_cost(batch: ScoredRollouts) -> Tensor:
    """r, the log-ratio of the sampled token, (B, T)."""
    return log_ratio(batch.student_logp, batch.teacher_logp).detach()


def clipped_cost(batch: ScoredRollouts, limit: float) -> Tensor:
    """r held within -limit and limit nats, (B, T).

    Tames single tokens of which a model is certain and the other not. Biased: the mean is that of
    the clipped ratio, sum_v p clip(log p/q) grad log p, so that rare tokens which either model all
    but rules out pull with at most `limit`. No bias where no token goes that far.
    """
    return sampled_cost(batch).clamp(-limit, limit)


def mean_cost(batch: ScoredRollouts) -> Tensor:
    """K = KL(student || teacher) at the prefix, the mean of r over the token, (B, T).

    Raises:
      ValueError: the batch has no prefix functionals.
    """
    if batch.prefix is None:
        raise InvalidInput(
            "the local KL needs whole next-token distributions; score the batch with prefix "
            "functionals (diagnostics.core.distribution_stats)"
        )
    return batch.prefix.reverse_kl.detach()


def no_cost(batch: ScoredRollouts) -> Tensor:
    """A local objective has no score-function part."""
    return torch.zeros_like(batch.student_logp)


# --- importance ratios --------------------------------------------------------------------------


def no_ratio(batch: ScoredRollouts) -> Tensor:
    """Every token counts once; right only if the sampler is the student."""
    return torch.ones_like(batch.student_logp)


def token_ratio(batch: ScoredRollouts) -> Tensor:
    """student(y | prefix) / sampler(y | prefix): repairs the token's own term, not the prefixes.

    At gamma = 0 the mean is the local gradient over the *sampler's* prefixes. Tokens that the
    sampler never draws (top-p) stay missing.
    """
    return (batch.student_logp - batch.sampler_logp).detach().exp()


def sequence_ratio(batch: ScoredRollouts) -> Tensor:
    """The product of the ratios of all sampled tokens of the response, (B, T) constant along T.

    Also of those that are not supervised: how much too often the sampler produces a response does
    not depend on where the loss is taken. Unbiased where the sampler draws every token that the
    student can; its variance grows exponentially with the length.
    """
    away = (batch.student_logp - batch.sampler_logp).detach() * batch.sampled
    away = away.sum(1, keepdim=True)
    return away.exp().expand_as(batch.student_logp)


RATIOS: dict[str, Callable[[ScoredRollouts], Tensor]] = {
    "none": no_ratio,
    "token": token_ratio,
    "sequence": sequence_ratio,
}
