"""Selection: which supervised tokens of a step the loss is taken over, and its denominator.

The credit of a token counts all that follow it, selected or not, and a sequence ratio all of the
response: compute both first, on the whole batch, then narrow what it supervises
(`Rollouts.supervise`) and let loss and denominator see that alone.

Shapes: B responses, T positions.
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput

TIE = 1e-4
"""Nats within which two entropies count as equal: ten times what float32 rounds a logit of 100."""


def most_uncertain(batch: ScoredRollouts, fraction: float) -> Tensor:
    """(B, T) bool: the `fraction` of the step's supervised tokens with the largest entropy.

    The entropy is that of the student's next-token distribution when the rollouts were scored. The
    number kept is the nearest integer, at least 1. Entropies within TIE of the last one kept count
    as equal to it, so that rounding, which depends on how a batch was split, does not choose among
    equals; of these the earlier token stays, by number of the prompt, row and position. Call it
    once a step: a fraction of each micro-batch is another set.
    (arXiv 2506.01939 for the idea, in reinforcement learning.)

    Raises:
      ValueError: fraction outside (0, 1], or the batch has no prefix functionals.
    """
    if not 0 < fraction <= 1:
        raise InvalidInput(f"fraction is {fraction}; the share of tokens kept must lie in (0, 1]")
    if batch.prefix is None:
        raise InvalidInput(
            "selection by entropy needs whole next-token distributions; score the batch with "
            "prefix functionals (diagnostics.core.distribution_stats)"
        )
    entropy = batch.prefix.student_entropy.masked_fill(~batch.mask, -torch.inf).flatten()
    count = max(1, round(fraction * int(batch.mask.sum())))
    last = entropy.sort(descending=True).values[count - 1]
    above, tied = entropy > last + TIE, (entropy - last).abs() <= TIE
    by_prompt = torch.arange(entropy.numel(), device=entropy.device).view_as(batch.mask)
    by_prompt = by_prompt[batch.prompt.argsort(stable=True)].flatten()
    first = by_prompt[tied[by_prompt]][: count - int(above.sum())]
    keep = above.index_fill(0, first, True)
    return keep.view_as(batch.mask) & batch.mask
