"""An objective as data, and the loss of a batch: its parts put together, in one place.

loss = sum over supervised tokens of ratio / denominator * surrogate(credit)

Credit, ratio and denominator are those of the whole optimizer step and carry no gradient; the sum
may be taken in parts. The study, the trainer, verl's losses and `opd.scoring.loss.policy_loss` all
call these functions; they differ in where the student's log-probabilities come from.

Shapes: B responses, T positions, K support ids, N supervised tokens; "..." is (B, T) or (N,).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from opd.objectives.credit import NO_BASELINE, NO_COST, Baseline, Cost, discounted, no_ratio
from opd.objectives.inputs import TokenInputs
from opd.objectives.requirements import Requirements
from opd.objectives.surrogates import NO_FORM, PLAIN_SCORE, Form, Score
from opd.objectives.user_loss import UserLoss


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Combination of a credit and a surrogate.

    The credit of a token is its own cost plus the later costs discounted by gamma, minus the
    baseline, plus the cost of the reward: functions from ScoredRollouts to (B, T) over the whole
    step. The surrogate is a local part plus, where there is a credit, the score function of it.
    Every part is a record of a function and of what the function reads, so that wrapping a function
    changes no answer.
    """

    support: str = "none"
    """Ids on which both models are compared, as in `Requirements.support`."""
    local: Form = NO_FORM
    """Part of a token's loss that does not depend on the credit."""
    score: Score = PLAIN_SCORE
    """Score function of the credit, the other part of a token's loss."""
    own_cost: Cost = NO_COST
    """Cost of the token itself."""
    later_cost: Cost = NO_COST
    """Cost of a token as it enters the credit of earlier tokens."""
    gamma: float = 0.0
    """Discount of later costs."""
    baseline: Baseline = NO_BASELINE
    """Baseline subtracted from the credit."""
    reward_cost: Callable[[ScoredRollouts], Tensor] | None = None
    """(B, T) cost of the reward, added to the credit; None without a reward."""
    ratio: Callable[[ScoredRollouts], Tensor] = no_ratio
    """(B, T) factor of a token's loss that corrects for a sampler other than the student."""
    mask_scope: str = "cost"
    """What a mask removes, one of `opd.objectives.credit.MASK_SCOPES`."""
    support_k: int = 16
    """K, the ids per model of a top-K support; the loss itself takes any number."""
    user_loss: UserLoss | None = None
    """Loss of a whole optimizer step in the place of credit and surrogate; None for ours."""

    @property
    def costs(self) -> tuple[Cost, ...]:
        """The costs that enter the credit."""
        return (self.own_cost, self.later_cost) if self.gamma else (self.own_cost,)

    @property
    def has_credit(self) -> bool:
        """Whether the credit enters the loss; without costs and reward it is 0."""
        return self.reward_cost is not None or any(not cost.is_zero for cost in self.costs)

    @property
    def requirements(self) -> Requirements:
        """What the loss reads, and when it is valid."""
        if self.user_loss is not None:
            asks = self.user_loss.asks
            return Requirements(
                support=self.user_loss.support,
                support_k=self.support_k,
                sampled_logp=bool({"tokens", "student_logp"} & {*asks}),
                teacher_sampled_logp="teacher_logp" in asks,
                normalised=True,
                distributions=False,
                whole_groups=True,
                on_policy=bool({"tokens", "student_logp"} & {*asks}) and "sampler_logp" not in asks,
                own_samples=bool({"tokens", "student_logp"} & {*asks})
                and "sampler_logp" not in asks,
                teacher=any(name.startswith("teacher") for name in asks),
            )
        reads_ratio = any(cost.sampled for cost in self.costs)
        unweighted = self.has_credit and not self.score.importance_weighted
        return Requirements(
            support=self.support,
            support_k=self.support_k,
            sampled_logp=self.has_credit or self.local.reads_sample or self.local.likelihood,
            teacher_sampled_logp=reads_ratio or self.local.reads_sample,
            normalised=self.has_credit or not self.local.renormalises,
            distributions=self.baseline.distributions
            or any(cost.distributions for cost in self.costs),
            whole_groups=self.baseline.whole_groups or self.reward_cost is not None,
            on_policy=unweighted or self.local.reads_sample,
            own_samples=self.has_credit or self.local.reads_sample,
            teacher=self.support != "none"
            or self.local.reads_sample
            or self.baseline.distributions
            or any(not cost.is_zero for cost in self.costs),
        )

    def credit(self, batch: ScoredRollouts) -> Tensor:
        """Compute own_t + sum_{u > t} gamma^(u-t) later_u - baseline_t + reward_cost per token.

        With the mask scope "loss", costs of tokens that were sampled but are not supervised are
        part of the credit of earlier tokens; with "cost" they count as 0 (`MASK_SCOPES`). Such
        tokens advance gamma in both cases.

        Args:
            batch: Scored rollouts of the whole optimizer step.

        Returns:
            (B, T) credit without gradient, 0 where nothing is supervised.
        """
        cost_mask = batch.sampled if self.mask_scope == "loss" else batch.mask
        credit = self.own_cost.function(batch) * cost_mask
        if self.gamma:
            later_costs = self.later_cost.function(batch) * cost_mask
            credit = credit + discounted(later_costs, batch.sampled, self.gamma) - later_costs
        credit = credit - self.baseline.function(batch, credit)
        if self.reward_cost is not None:
            credit = credit + self.reward_cost(batch)
        return credit * batch.mask

    def surrogate(self, inputs: TokenInputs) -> Tensor:
        """Return the (...) loss of tokens, neither weighted nor reduced.

        Args:
            inputs: The tokens.

        Returns:
            Their losses.

        Raises:
            InvalidInput: The loss is a function of the user's own, which has no loss of a token.
        """
        if self.user_loss is not None:
            raise InvalidInput(
                f"the objective {self.user_loss.name} is a loss of a whole optimizer step, not of "
                "tokens; call it through opd.policy_loss or opd.train, or choose another objective"
            )
        local = self.local.surrogate(inputs)
        return local + self.score.function(inputs) if self.has_credit else local


def token_weights(ratio: Tensor, denominator: Tensor) -> Tensor:
    """Return (B, T) the factor of each token's loss.

    The denominator is an argument because it is computed once over the whole optimizer step:
    splitting the step into micro-batches then changes nothing.

    Args:
        ratio: (B, T) importance ratios.
        denominator: (B,) one per response (`opd.objectives.reduction`).

    Returns:
        ratio / denominator.
    """
    return ratio / denominator[:, None]


def weighted_losses(objective: Objective, inputs: TokenInputs) -> Tensor:
    """Return the (...) weighted losses of tokens; their sum is the loss.

    Args:
        objective: The objective.
        inputs: The tokens, with the student's log-probabilities.

    Returns:
        Losses with gradient to the student's log-probabilities.
    """
    return objective.surrogate(inputs) * inputs.weight


def batch_losses(
    objective: Objective,
    batch: ScoredRollouts,
    logp: Tensor | None,
    support_logp: Tensor | None = None,
    *,
    denominator: Tensor | None = None,
    credit: Tensor | None = None,
) -> Tensor:
    """Return the (B, T) weighted losses of a batch, 0 outside the mask; their sum is the loss.

    Args:
        objective: The objective.
        batch: Scored rollouts of the whole optimizer step, or of a part whose credit is given.
        logp: (B, T) student log-probabilities of the sampled tokens, with gradient; None if unread.
        support_logp: (B, T, K) student log-probabilities on the support, with gradient, or None.
        denominator: (B,) one per response, of the whole step; 1 if None.
        credit: (B, T) credit of every token; that of the batch if None.

    Returns:
        Losses with gradient to `logp` and `support_logp`.

    Raises:
        InvalidInput: The batch lacks the objective's support, or what the objective reads is None.
    """
    if credit is None:
        credit = objective.credit(batch)
    if denominator is None:
        denominator = batch.student_logp.new_ones(len(batch))
    weight = token_weights(objective.ratio(batch), denominator)
    inputs = TokenInputs.of(batch, objective.support, credit, weight)
    mask = batch.mask
    inputs = replace(
        inputs,
        logp=None if logp is None else logp[mask],
        support_logp=None if support_logp is None else support_logp[mask],
    )
    losses = weighted_losses(objective, inputs)
    return losses.new_zeros(mask.shape).masked_scatter(mask, losses)
