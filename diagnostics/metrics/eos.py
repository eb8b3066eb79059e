"""EOS metrics (C-3): how both models end a response, and under which token id.

Each model has its own set of EOS ids; the batch carries the log-mass of each model on its own set,
`DistributionStats.student_end` and `DistributionStats.teacher_end`. Shapes: B responses, T
positions.
"""

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField, require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean, PositionMean

TOKENS_BEFORE_END = 5
"""Number of tokens before the end over which `end_wish_before` is averaged."""


def endings(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """C-3, D-6: Compare the probabilities that student and teacher give to ending the response.

    Access: L2 with the log-masses of the EOS ids (`score` with the pair's EOS map).
    Source: this toolkit, from the two conventions of figure 5 of 2603.25562.
    Healthy: end_wish near 0 and end_name below 1. A large end_name with an end_wish near 0 means
    that the models use different EOS ids: set map_eos or mask the EOS token. A very negative
    end_wish means that the teacher would continue: the student stops too early. end_push near 0:
    above 0, the update favours ending and responses get shorter; below 0, it favours continuing and
    truncation follows. Where a mask removes the EOS tokens, end_name is NaN.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/end_wish: At the sampled EOS ids y, mean of log sum_{ends of q} q - log sum_{ends
            of p} p.
        divergence/end_wish_before: end_wish over the 5 tokens before.
        divergence/end_name: At the supervised EOS ids, mean of log sum_{ends of q} q - log q(y),
            the part of the loss that is due to y not being one of the teacher's EOS ids.
        divergence/end_push: Over all supervised tokens, mean of -r (1[y is an end] - sum_{ends of
            p} p), the descent direction of the sampled-token loss on the logits of the student's
            EOS ids.
        divergence/student_hazard: Over all sampled tokens, mean of the student's mass on its own
            EOS ids, by position.
        divergence/teacher_hazard: The same of the teacher.

    Raises:
        MissingField: The distribution stats lack the log-masses of the EOS ids.
    """
    prefix, mask, sampled = require_distribution_stats(batch), batch.mask, batch.sampled
    student_end, teacher_end, ending = prefix.student_end, prefix.teacher_end, prefix.ending
    if student_end is None or teacher_end is None or ending is None:
        raise MissingField(
            "the distribution stats lack the EOS log-masses of both models; score with an EOS map"
        )
    at_end = sampled & (ending > 0)
    end_log_ratio, end_descent = (
        teacher_end - student_end,
        -batch.log_ratio * (at_end.double() - student_end.exp()),
    )
    return {
        "divergence/end_wish": Mean.from_values(end_log_ratio, at_end, batch.prompt),
        "divergence/end_wish_before": Mean.from_values(
            end_log_ratio, tokens_before(at_end, sampled, TOKENS_BEFORE_END), batch.prompt
        ),
        "divergence/end_name": Mean.from_values(
            teacher_end - batch.teacher_logp, at_end & mask, batch.prompt
        ),
        "divergence/end_push": Mean.from_values(end_descent, mask, batch.prompt),
        "divergence/student_hazard": PositionMean.from_values(
            student_end.exp(), sampled, batch.prompt
        ),
        "divergence/teacher_hazard": PositionMean.from_values(
            teacher_end.exp(), sampled, batch.prompt
        ),
    }


def tokens_before(events: Tensor, mask: Tensor, count: int) -> Tensor:
    """Select the `count` tokens of the mask before the first event of each response.

    Args:
        events: (B, T) bool.
        mask: (B, T) bool.
        count: Number of tokens.

    Returns:
        (B, T) bool; nothing in rows without an event.
    """
    first = events & (events.cumsum(1) == 1)
    ordinal = mask.cumsum(1)  # 1-based index among the tokens of the mask
    first_ordinal = (ordinal * first).amax(1, keepdim=True)  # 0 where a row has no event
    return mask & (ordinal < first_ordinal) & (ordinal >= first_ordinal - count)
