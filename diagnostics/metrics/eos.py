"""How both models end (C-3): the wish to stop, apart from the name that it goes by.

Each model has its own set of end ids; the batch carries the log-mass of each on its own set,
`DistributionStats.student_end` and `DistributionStats.teacher_end`. Shapes: B responses, T positions.
"""

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField, prefix_of
from diagnostics.core.totals import Accumulator, Mean, PositionMean

BEFORE = 5


def endings(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """C-3, D-6: does the teacher want to end where the student ends, and under which name?

    At the sampled end ids y: end_wish = mean of log sum_{ends of q} q - log sum_{ends of p} p;
    end_wish_before = end_wish over the 5 tokens before; end_name, at the supervised ends alone =
    mean of log sum_{ends of q} q - log q(y), what the loss pays because y is not one of the
    teacher's ends. Over all supervised tokens: end_push = mean of -r (1[y is an end] - sum_{ends of
    p} p), the descent direction of the sampled-token loss on the logits of the student's ends. Over
    all sampled ones: student_hazard, teacher_hazard = mean of each model's mass on its own ends, by
    position.
    Access: L2 with the ends' log-masses (`score` with the pair's endings). Source: ours, from the
    two conventions of figure 5 of 2603.25562.
    Healthy: end_wish near 0 and end_name below 1. A large end_name with an end_wish near 0 is a
    naming mismatch: set map_eos or mask the end. A very negative end_wish is a teacher that would
    go on: the student stops too early for it. end_push near 0: above, sampled tokens pay for
    ending, so that responses get shorter; below, for going on, and truncation will follow. Where a
    mask takes the ends out, end_name is NaN.
    """
    prefix, mask, sampled = prefix_of(batch), batch.mask, batch.sampled
    ours, theirs, ending = prefix.student_end, prefix.teacher_end, prefix.ending
    if ours is None or theirs is None or ending is None:
        raise MissingField("the prefix functionals lack the log-masses of both models' end ids")
    here = sampled & (ending > 0)
    wish, push = theirs - ours, -batch.log_ratio * (here.double() - ours.exp())
    return {
        "divergence/end_wish": Mean.of(wish, here, batch.prompt),
        "divergence/end_wish_before": Mean.of(wish, before(here, sampled, BEFORE), batch.prompt),
        "divergence/end_name": Mean.of(theirs - batch.teacher_logp, here & mask, batch.prompt),
        "divergence/end_push": Mean.of(push, mask, batch.prompt),
        "divergence/student_hazard": PositionMean.of(ours.exp(), sampled, batch.prompt),
        "divergence/teacher_hazard": PositionMean.of(theirs.exp(), sampled, batch.prompt),
    }


def before(here: Tensor, mask: Tensor, count: int) -> Tensor:
    """(B, T) bool: the `count` tokens of the mask before the first of `here` in a response."""
    first = here & (here.cumsum(1) == 1)
    place = mask.cumsum(1)  # of each token of the mask, from 1 on
    end = (place * first).amax(1, keepdim=True)  # 0 where there is none
    return mask & (place < end) & (place >= end - count)
