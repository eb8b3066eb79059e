"""How both models end (C-3): the wish to stop, apart from the name that it goes by.

Each model has its own set of end ids; the batch carries the log-mass of each on its own set,
`Prefix.student_end` and `Prefix.teacher_end`. Shapes: B responses, T positions.
"""

import torch
from torch import Tensor

from diagnostics.access import Missing, prefix_of
from diagnostics.batch import Scored
from diagnostics.bins import extents
from diagnostics.totals import Mean, Profile, Total

BEFORE = 5


def endings(batch: Scored) -> dict[str, Total]:
    """C-3: does the teacher want to end where the student ends, and under which name?

    Over responses that ended, at their last supervised token y: end_wish = mean of
    log sum_{ends of q} q - log sum_{ends of p} p; end_name = mean of log sum_{ends of q} q -
    log q(y), what is lost because y is not one of the teacher's ends; end_wish_before = end_wish
    over the 5 tokens before. student_hazard, teacher_hazard = mean of each model's mass on its own
    ends, by position.
    Access: L2 with the ends' log-masses (`score` with the pair's endings). Source: ours, from the
    two conventions of figure 5 of 2603.25562.
    Healthy: end_wish near 0 and end_name below 1. A large end_name with an end_wish near 0 is a
    naming mismatch: set own_end or mask the end. A very negative end_wish is a teacher that would
    go on: the student stops too early for it.
    """
    prefix = prefix_of(batch)
    if prefix.student_end is None or prefix.teacher_end is None:
        raise Missing("the prefix functionals lack the log-masses of both models' end ids")
    ours, theirs = prefix.student_end, prefix.teacher_end
    last, before = last_token(batch), tokens_before(batch, BEFORE)
    wish = theirs - ours
    return {
        "drift/end_wish": Mean.of(wish, last, batch.prompt),
        "drift/end_wish_before": Mean.of(wish, before, batch.prompt),
        "drift/end_name": Mean.of(theirs - batch.teacher_logp, last, batch.prompt),
        "drift/student_hazard": Profile.of(ours.exp(), batch.mask, batch.prompt),
        "drift/teacher_hazard": Profile.of(theirs.exp(), batch.mask, batch.prompt),
    }


def last_token(batch: Scored) -> Tensor:
    """(B, T) bool: the last supervised token of a response that ended."""
    place = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    return (place == extents(batch.mask)[:, None] - 1) & batch.mask & batch.ended[:, None]


def tokens_before(batch: Scored, count: int) -> Tensor:
    """(B, T) bool: the `count` supervised tokens before the last one of a response that ended."""
    left = batch.mask.flip(1).cumsum(1).flip(1)  # supervised tokens from here on
    return batch.mask & batch.ended[:, None] & (left >= 2) & (left <= count + 1)
