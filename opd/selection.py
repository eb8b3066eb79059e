"""Selection: which supervised tokens of a step the loss is taken over, and its denominator.

The credit of a token counts all that follow it, selected or not, and a sequence ratio all of the
response: compute both first, on the whole batch, then narrow what it supervises
(`Rollouts.supervise`) and let loss and denominator see that alone.

Shapes: B responses, T positions.
"""

import torch
from torch import Tensor

from diagnostics.batch import Scored
from diagnostics.errors import InvalidInput


def most_uncertain(batch: Scored, fraction: float) -> Tensor:
    """(B, T) bool: the `fraction` of the step's supervised tokens with the largest entropy.

    The entropy is that of the student's next-token distribution when the rollouts were scored. The
    number kept is the nearest integer, at least 1; of equal entropies the earlier token in
    row-major order stays. Call it once a step: a fraction of each micro-batch is another set.
    (arXiv 2506.01939 for the idea, in reinforcement learning.)

    Raises:
      ValueError: fraction outside (0, 1], or the batch has no prefix functionals.
    """
    if not 0 < fraction <= 1:
        raise InvalidInput(f"fraction is {fraction}; the share of tokens kept must lie in (0, 1]")
    if batch.prefix is None:
        raise InvalidInput(
            "selection by entropy needs whole next-token distributions; score the batch with "
            "prefix functionals (diagnostics.prefix)"
        )
    entropy = batch.prefix.student_entropy.masked_fill(~batch.mask, -torch.inf).flatten()
    count = max(1, round(fraction * int(batch.mask.sum())))
    kept = entropy.sort(descending=True, stable=True).indices[:count]
    keep = torch.zeros_like(entropy, dtype=torch.bool).index_fill(0, kept, True)
    return keep.view_as(batch.mask) & batch.mask
