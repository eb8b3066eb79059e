"""The loss of a batch: credit, ratio, denominator and surrogate put together, in one place.

loss = sum over supervised tokens of ratio / denominator * surrogate(credit)

Credit, ratio and denominator are those of the whole optimizer step and carry no gradient; the sum
may be taken in parts. The study, the trainer, verl's losses and `opd.scoring.loss.policy_loss` all
call these functions; they differ in where the student's log-probabilities come from.

Shapes: B responses, T positions, K support ids, N supervised tokens.
"""

from dataclasses import replace

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective


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
