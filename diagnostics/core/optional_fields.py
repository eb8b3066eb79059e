"""What a batch may lack: the two optional parts, asked for by name.

A metric that needs more than sampled-token log-probabilities gets its part here. `Monitor` turns
`Missing` into a note, anyone else sees the error.
"""

from diagnostics.batch import Prefix, Scored, Support


class Missing(LookupError):
    """A part that this metric needs is not in the batch."""


def prefix_of(batch: Scored) -> Prefix:
    """The exact functionals (both full distributions were at hand)."""
    if batch.prefix is None:
        raise Missing("the batch has no prefix functionals (needs both full distributions)")
    return batch.prefix


def support_of(batch: Scored) -> Support:
    """The K ids a position with both models' log-probabilities."""
    if batch.support is None:
        raise Missing("the batch has no support (needs top-K log-probabilities)")
    return batch.support
