"""Consistency of a support with the sampled tokens: is it the top-K list that it claims to be?

Identities that hold at every token, whatever the two models are, so that their null is 0 and not a
level of health. Shapes: B responses, T positions, K support ids. S is the support, y the sampled
token, p the student, q the teacher.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.optional_fields import support_of
from diagnostics.core.totals import Accumulator, Mean

TIE = 0.02
"""Nats by which a token outside a top-K list may exceed the list's last id: two equal numbers that
were rounded to bfloat16 on their way differ by so much at a log-probability of -4."""
OVER = 0.01
"""Probability beyond 1 that is rounding: the sum of K probabilities rounded to bfloat16."""


def support_consistency(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-5: contradictions between a support and the log-probabilities of the sampled tokens.

    support_gap = mean |log q(y) in S - log q(y)| over tokens with y in S, the larger of it and the
    same for p; support_order_share = share of tokens outside S that their model holds more
    probable than the last id of its own top-K; support_twice_share = share of tokens with an id
    twice in S; support_mass_over_share = share of tokens with p(S) or q(S) above 1. Over all
    sampled tokens, supervised or not.
    Access: L1; the order for the sources "teacher" and "student" alone. Source: identities.
    Healthy: all 0. support_gap is -log q(S) on average where probabilities were renormalised on S
    before they were kept, and whole nats where ids and log-probabilities belong to other
    positions; support_order_share is near the sampled tokens' share in the top-K where ids are
    shifted or missing.
    """
    support = support_of(batch)
    present = torch.ones_like(support.ids, dtype=torch.bool)
    present = present if support.present is None else support.present
    same = (support.ids == batch.tokens[..., None]) & present & batch.sampled[..., None]
    inside = same.any(-1)
    student_gap = _value_at(support.student_logp, same) - batch.student_logp
    teacher_gap = _value_at(support.teacher_logp, same) - batch.teacher_logp
    masses = torch.stack(support.masses()).amax(0)
    totals: dict[str, Accumulator] = {
        "consistency/support_gap": Mean.of(
            torch.maximum(student_gap.abs(), teacher_gap.abs()), inside, batch.prompt
        ),
        "consistency/support_mass_over_share": Mean.of(
            masses > 1 + OVER, batch.sampled, batch.prompt
        ),
    }
    if support.source != "full":
        twice = _has_duplicate(support.ids, present)
        totals["consistency/support_twice_share"] = Mean.of(twice, batch.sampled, batch.prompt)
    if support.source in ("teacher", "student"):
        missed = _missed(batch, support, present) & ~inside
        totals["consistency/support_order_share"] = Mean.of(missed, batch.sampled, batch.prompt)
    return totals


def _value_at(logp: Tensor, same: Tensor) -> Tensor:
    """(B, T) log-probability of the support's entry that is the sampled token; 0 without one."""
    return torch.where(same, logp, 0.0).amin(-1)


def _missed(batch: ScoredRollouts, support: Support, present: Tensor) -> Tensor:
    """(B, T) bool: the sampled token is more probable than the least probable id present."""
    logp, listed = batch.teacher_logp, support.teacher_logp
    if support.source == "student":
        logp, listed = batch.student_logp, support.student_logp
    return logp > listed.masked_fill(~present, torch.inf).amin(-1) + TIE


def _has_duplicate(ids: Tensor, present: Tensor) -> Tensor:
    """(B, T) bool: some id present stands twice; absent entries get ids of their own below 0."""
    own = -1 - torch.arange(ids.shape[-1], device=ids.device)
    ordered = torch.where(present, ids, own).sort(-1).values
    return (ordered[..., 1:] == ordered[..., :-1]).any(-1)
