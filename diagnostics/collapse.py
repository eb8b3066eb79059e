"""Collapse indicators (D-*) that need no teacher: length, truncation, reward.

Repetition stands in `diagnostics.repetition`, student entropy by position in `diagnostics.drift`.
Everything here is one number a response, (B,). Sampling unit: the prompt.
"""

from diagnostics.batch import Scored
from diagnostics.totals import Mean, Total


def length(batch: Scored) -> dict[str, Total]:
    """D-1, D-2: supervised tokens a response, and how many responses hit the budget.

    length = mean of sum_t m over all responses; length_ended = the same over those that stopped by
    themselves; truncated_share = mean 1[not ended].
    Access: the mask and `ended`. Source: 2604.08527 (share 0.45-0.5 to 0.9-1.0 within 30 steps).
    Healthy: truncated_share small and steady. length is censored at the budget, so a run whose
    length levels off while length_ended falls is losing its ability to stop.
    """
    lengths = batch.lengths
    return {
        "collapse/length": Mean.of(lengths, batch.mask.new_ones(len(batch)), batch.prompt),
        "collapse/length_ended": Mean.of(lengths, batch.ended, batch.prompt),
        "collapse/truncated_share": Mean.of(
            ~batch.ended, batch.mask.new_ones(len(batch)), batch.prompt
        ),
    }


def reward(batch: Scored) -> dict[str, Total]:
    """Outcome reward, mean over the responses that something graded (reward is not NaN).

    Access: `reward`. graded_share = share of graded responses; reward reads NaN when it is 0.
    Healthy: rises, or stays while the divergence falls.
    """
    graded = ~batch.reward.isnan()
    return {
        "collapse/reward": Mean.of(batch.reward, graded, batch.prompt),
        "collapse/graded_share": Mean.of(graded, batch.mask.new_ones(len(batch)), batch.prompt),
    }
