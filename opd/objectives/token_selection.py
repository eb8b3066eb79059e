"""Selection of the supervised tokens over which the loss and its denominator are taken.

The credit of a token includes the tokens that follow it, selected or not, and a sequence ratio
includes the whole response. Compute both first, on the whole batch; then narrow the mask
(`Rollouts.supervise`) for loss and denominator.

Shapes: B responses, T positions.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput

TIE_TOLERANCE = 1e-4
"""Nats within which two entropies are equal: ten times the float32 rounding of a logit of 100."""


def highest_entropy_tokens(batch: ScoredRollouts, fraction: float) -> Tensor:
    """Return (B, T) bool, the `fraction` of the step's supervised tokens with the largest entropy.

    The entropy is that of the student's next-token distribution when the rollouts were scored. The
    number of tokens kept is rounded to the nearest integer and at least 1. Entropies within
    TIE_TOLERANCE of the last one kept count as equal to it, because rounding depends on how a batch
    was split; ties go to the token with the smallest prompt number, row and position. Call it once
    per step: a fraction of each micro-batch is a different set. (arXiv 2506.01939 for the idea, in
    reinforcement learning.)

    Args:
        batch: Scored rollouts of the whole optimizer step, with distribution statistics.
        fraction: Share of the supervised tokens to keep, in (0, 1].

    Returns:
        (B, T) bool, a subset of the mask.

    Raises:
        InvalidInput: fraction is outside (0, 1], or the batch has no distribution statistics.
    """
    if not 0 < fraction <= 1:
        raise InvalidInput(
            f"fraction is {fraction}; the share of tokens to keep must lie in (0, 1]"
        )
    if batch.prefix is None:
        raise InvalidInput(
            "selection by entropy needs distribution statistics; score the batch with `score`, "
            "which adds them (diagnostics.core.distribution_stats)"
        )
    entropy = batch.prefix.student_entropy.masked_fill(~batch.mask, -torch.inf).flatten()
    count = max(1, round(fraction * int(batch.mask.sum())))
    threshold = entropy.sort(descending=True).values[count - 1]
    clearly_above, tied = (
        entropy > threshold + TIE_TOLERANCE,
        (entropy - threshold).abs() <= TIE_TOLERANCE,
    )
    by_prompt = torch.arange(entropy.numel(), device=entropy.device).view_as(batch.mask)
    by_prompt = by_prompt[batch.prompt.argsort(stable=True)].flatten()
    first_tied = by_prompt[tied[by_prompt]][: count - int(clearly_above.sum())]
    keep = clearly_above.index_fill(0, first_tied, True)
    return keep.view_as(batch.mask) & batch.mask
