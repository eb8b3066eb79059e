"""Access to the two optional parts of a batch, with an error that names a missing part.

A metric that needs more than the log-probabilities of sampled tokens gets its part here. `Monitor`
records `MissingField` in `Monitor.missing`; other callers see the error.
"""

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.missing import MissingField


def require_distribution_stats(batch: ScoredRollouts) -> DistributionStats:
    """Return the exact distribution statistics (which need both full distributions)."""
    if batch.prefix is None:
        raise MissingField(
            "the batch has no distribution statistics; score it with both full distributions"
        )
    return batch.prefix


def require_support(batch: ScoredRollouts) -> Support:
    """Return the K ids at each position with both models' log-probabilities."""
    if batch.support is None:
        raise MissingField("the batch has no support; score it with top-K log-probabilities")
    return batch.support
