"""Response metrics (D-*) that need no teacher: length, truncation, reward.

Repetition is in `diagnostics.metrics.repetition`, student entropy by position in
`diagnostics.metrics.divergence`. Everything here is one number a response, (B,). The sampling unit
is the prompt.
"""

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.core.histograms import Quantiles
from diagnostics.core.moments import Covariance
from diagnostics.core.totals import Accumulator, Mean


def length(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-1, D-2: Compute the response length and the share truncated at the budget.

    Access: the sampled tokens and `ended`.
    Source: 2604.08527 (share 0.45-0.5 to 0.9-1.0 within 30 steps).
    Healthy: truncated_share small and steady. length is censored at the budget, so a run whose
    length levels off while length_ended falls is losing its ability to stop.

    Args:
        batch: Scored rollouts.

    Returns:
        response/length: Mean over all responses of their tokens, supervised or not.
        response/length_ended: The same over responses that ended with an EOS token.
        response/truncated_share: Mean 1[not ended].
    """
    lengths = batch.lengths
    return {
        "response/length": Mean.from_values(lengths, batch.mask.new_ones(len(batch)), batch.prompt),
        "response/length_ended": Mean.from_values(lengths, batch.ended, batch.prompt),
        "response/truncated_share": Mean.from_values(
            ~batch.ended, batch.mask.new_ones(len(batch)), batch.prompt
        ),
    }


def length_quantiles(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-1: Compute quantiles of the number of sampled tokens a response.

    Access: the sampled tokens.
    Source: standard.
    Healthy: q95 below the budget. If the median rises while the lower quartile stays, only the
    longer half of the responses is getting longer.

    Args:
        batch: Scored rollouts.

    Returns:
        response/lengths: lengths_q50 is the median, lengths_q95, and so on; resolution 9 %
            (`Quantiles`).
    """
    all_responses = batch.mask.new_ones(len(batch))
    return {"response/lengths": Quantiles.from_values(batch.lengths, all_responses)}


def length_incentive(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-6: Compute the covariance of response length and mean advantage.

    Access: L0.
    Source: derived; the dilution of 2607.13399.
    Healthy: about 0. If it is clearly positive, an objective that averages over a response's tokens
    rewards length: the student can dilute its penalty. Responses of one prompt are dependent, so
    the coefficient is noisier than their number suggests.

    Args:
        batch: Scored rollouts.

    Returns:
        response/length_advantage: length_advantage_cov and length_advantage_corr, covariance and
            correlation over responses of the length in sampled tokens and the mean of -r over the
            supervised tokens (the mean advantage).
    """
    num_supervised = batch.mask.sum(1)
    sums = torch.where(batch.mask, batch.log_ratio.double(), 0.0).sum(1)
    advantage = -sums / num_supervised.clamp(min=1)
    return {
        "response/length_advantage": Covariance.from_values(
            batch.lengths, advantage, num_supervised > 0
        )
    }


def reward(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Compute the mean outcome reward over the graded responses (reward is not NaN).

    Access: `reward`.
    Source: standard.
    Healthy: rises, or stays while the divergence falls.

    Args:
        batch: Scored rollouts.

    Returns:
        response/reward: Mean reward, NaN when graded_share is 0.
        response/graded_share: Share of graded responses.
    """
    graded = ~batch.reward.isnan()
    return {
        "response/reward": Mean.from_values(batch.reward, graded, batch.prompt),
        "response/graded_share": Mean.from_values(
            graded, batch.mask.new_ones(len(batch)), batch.prompt
        ),
    }
