"""Collapse indicators (D-*) that need no teacher: length, truncation, reward.

Repetition stands in `diagnostics.metrics.repetition`, student entropy by position in `diagnostics.metrics.divergence`.
Everything here is one number a response, (B,). Sampling unit: the prompt.
"""

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.core.histograms import Quantiles
from diagnostics.core.moments import Covariance
from diagnostics.core.totals import Accumulator, Mean


def length(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-1, D-2: sampled tokens a response, and how many responses hit the budget.

    length = mean over all responses of their tokens, supervised or not; length_ended = the same
    over those that stopped by themselves; truncated_share = mean 1[not ended].
    Access: what was sampled, and `ended`. Source: 2604.08527 (share 0.45-0.5 to 0.9-1.0 within 30
    steps).
    Healthy: truncated_share small and steady. length is censored at the budget, so a run whose
    length levels off while length_ended falls is losing its ability to stop.
    """
    lengths = batch.lengths
    return {
        "response/length": Mean.of(lengths, batch.mask.new_ones(len(batch)), batch.prompt),
        "response/length_ended": Mean.of(lengths, batch.ended, batch.prompt),
        "response/truncated_share": Mean.of(
            ~batch.ended, batch.mask.new_ones(len(batch)), batch.prompt
        ),
    }


def length_quantiles(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-1: quantiles of the sampled tokens a response.

    lengths_q50 the median, lengths_q95, and so on; resolution 9 % (`Quantiles`).
    Access: what was sampled. Source: standard.
    Healthy: q95 below the budget. A median that rises while the lower quartile stays is the longer
    half getting longer, not everything.
    """
    everyone = batch.mask.new_ones(len(batch))
    return {"response/lengths": Quantiles.of(batch.lengths, everyone)}


def length_incentive(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-6: does a longer response have a lower cost per token?

    length_advantage_cov, _corr = covariance and correlation over responses of their length in
    sampled tokens and of the mean of -r over the supervised ones, the mean advantage. Access: L0.
    Source: derived; the dilution of 2607.13399.
    Healthy: about 0. Clearly positive, an objective that averages over a response's tokens pays for
    length: the student can dilute what it is punished for. Responses of one prompt depend on each
    other, so the coefficient is noisier than their number suggests.
    """
    count = batch.mask.sum(1)
    sums = torch.where(batch.mask, batch.log_ratio.double(), 0.0).sum(1)
    advantage = -sums / count.clamp(min=1)
    return {"response/length_advantage": Covariance.of(batch.lengths, advantage, count > 0)}


def reward(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Outcome reward, mean over the responses that something graded (reward is not NaN).

    graded_share = share of graded responses; reward reads NaN when it is 0.
    Access: `reward`. Source: standard.
    Healthy: rises, or stays while the divergence falls.
    """
    graded = ~batch.reward.isnan()
    return {
        "response/reward": Mean.of(batch.reward, graded, batch.prompt),
        "response/graded_share": Mean.of(graded, batch.mask.new_ones(len(batch)), batch.prompt),
    }
