"""What a batch may lack: the two optional parts, asked for by name.

A metric that needs more than sampled-token log-probabilities gets its part here. `Monitor` turns
`MissingField` into a note, anyone else sees the error.
"""

from diagnostics.batch import DistributionStats, ScoredRollouts, Support


class MissingField(LookupError):
    """A part that this metric needs is not in the batch."""


def prefix_of(batch: ScoredRollouts) -> DistributionStats:
    """The exact functionals (both full distributions were at hand)."""
    if batch.prefix is None:
        raise MissingField("the batch has no prefix functionals (needs both full distributions)")
    return batch.prefix


def support_of(batch: ScoredRollouts) -> Support:
    """The K ids a position with both models' log-probabilities."""
    if batch.support is None:
        raise MissingField("the batch has no support (needs top-K log-probabilities)")
    return batch.support
