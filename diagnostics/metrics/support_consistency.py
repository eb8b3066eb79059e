"""Consistency of a support with the sampled tokens: is it really the top-K list?

The identities hold at every token, whatever the two models are, so their null is exactly 0. Shapes:
B responses, T positions, K support ids. S is the support, y the sampled token, p the student, q the
teacher.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.optional_fields import require_support
from diagnostics.core.totals import Accumulator, Mean

TIE_TOLERANCE = 0.02
"""Nats by which a token outside a top-K list may exceed the list's last id.

Two equal numbers that were rounded to bfloat16 on the way differ by so much at a log-probability of
-4."""
MASS_TOLERANCE = 0.01
"""Probability above 1 that rounding explains: the sum of K probabilities rounded to bfloat16."""


def support_consistency(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-5: Detect contradictions between a support and the log-probabilities of the sampled tokens.

    Over all sampled tokens, supervised or not.

    Access: L1; the order for the sources "teacher" and "student" alone.
    Source: identities.
    Healthy: all 0. support_gap is -log q(S) on average where probabilities were renormalised on S
    before they were stored, and several nats where ids and log-probabilities belong to different
    positions; support_order_share is near the share of sampled tokens in the top-K where ids are
    shifted or missing.

    Args:
        batch: Scored rollouts.

    Returns:
        consistency/support_gap: Mean |log q(y) in S - log q(y)| over tokens with y in S, the larger
            of it and the same for p.
        consistency/support_order_share: Share of tokens outside S to which their model gives a
            higher probability than to the last id of its own top-K.
        consistency/support_twice_share: Share of tokens with a duplicate id in S.
        consistency/support_mass_over_share: Share of tokens with p(S) or q(S) above 1.
    """
    support = require_support(batch)
    present = torch.ones_like(support.ids, dtype=torch.bool)
    present = present if support.present is None else support.present
    is_sampled = (support.ids == batch.tokens[..., None]) & present & batch.sampled[..., None]
    inside = is_sampled.any(-1)
    student_gap = _sampled_logp_in_support(support.student_logp, is_sampled) - batch.student_logp
    teacher_gap = _sampled_logp_in_support(support.teacher_logp, is_sampled) - batch.teacher_logp
    masses = torch.stack(support.masses()).amax(0)
    totals: dict[str, Accumulator] = {
        "consistency/support_gap": Mean.from_values(
            torch.maximum(student_gap.abs(), teacher_gap.abs()), inside, batch.prompt
        ),
        "consistency/support_mass_over_share": Mean.from_values(
            masses > 1 + MASS_TOLERANCE, batch.sampled, batch.prompt
        ),
    }
    if support.source != "full":
        has_duplicate = _has_duplicate(support.ids, present)
        totals["consistency/support_twice_share"] = Mean.from_values(
            has_duplicate, batch.sampled, batch.prompt
        )
    if support.source in ("teacher", "student"):
        outranks = _outranks_support(batch, support, present) & ~inside
        totals["consistency/support_order_share"] = Mean.from_values(
            outranks, batch.sampled, batch.prompt
        )
    return totals


def _sampled_logp_in_support(logp: Tensor, is_sampled: Tensor) -> Tensor:
    """Return the sampled token's log-probability in the support, (B, T); 0 if absent."""
    return torch.where(is_sampled, logp, 0.0).amin(-1)


def _outranks_support(batch: ScoredRollouts, support: Support, present: Tensor) -> Tensor:
    """Return (B, T) bool: the sampled token is more probable than the least probable present id."""
    logp, support_logp = batch.teacher_logp, support.teacher_logp
    if support.source == "student":
        logp, support_logp = batch.student_logp, support.student_logp
    return logp > support_logp.masked_fill(~present, torch.inf).amin(-1) + TIE_TOLERANCE


def _has_duplicate(ids: Tensor, present: Tensor) -> Tensor:
    """Return (B, T) bool: a present id occurs twice; absent entries get distinct ids below 0."""
    placeholder_ids = -1 - torch.arange(ids.shape[-1], device=ids.device)
    sorted_ids = torch.where(present, ids, placeholder_ids).sort(-1).values
    return (sorted_ids[..., 1:] == sorted_ids[..., :-1]).any(-1)
