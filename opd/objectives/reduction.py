"""Reduction: losses of tokens to the loss of an optimizer step, by an explicit denominator.

Shapes: B responses, T positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput


def reduce(loss: Tensor, mask: Tensor, denominator: Tensor) -> Tensor:
    """sum_{i,t} mask loss / denominator_i: (B, T), (B, T), (B,) -> scalar.

    The denominator is an argument: computed once over the whole optimizer step, so that the split
    into micro-batches changes nothing.
    """
    return (torch.where(mask, loss, torch.zeros_like(loss)) / denominator[:, None]).sum()


def token_mean(batch: ScoredRollouts) -> Tensor:
    """(B,) every token weighs the same: the number of supervised tokens of the step."""
    return _positive(batch.mask.sum()).expand(len(batch)).to(batch.student_logp.dtype)


def sequence_sum(batch: ScoredRollouts) -> Tensor:
    """(B,) every response weighs its length: the mean over responses of token sums, as in J."""
    _positive(batch.mask.sum())
    return batch.student_logp.new_full((len(batch),), float(len(batch)))


def sequence_mean(batch: ScoredRollouts) -> Tensor:
    """(B,) every response weighs the same: B times the number of its supervised tokens.

    Its gradient is not that of E[mean_t K_t]: the length's own derivative is left out.
    """
    _positive(batch.mask.sum())
    return batch.mask.sum(1).clamp(min=1).to(batch.student_logp.dtype) * len(batch)


def group_mean(batch: ScoredRollouts) -> Tensor:
    """(B,) every prompt weighs the same: as many prompts times its rollouts' tokens.

    Within a group long responses weigh more. (arXiv 2603.25562, eq. 8.)
    """
    _positive(batch.mask.sum())
    prompts, group = batch.prompt.unique(return_inverse=True)
    tokens = torch.zeros_like(prompts).index_add_(0, group, batch.mask.sum(1))[group]
    return tokens.clamp(min=1).to(batch.student_logp.dtype) * len(prompts)


def _positive(count: Tensor) -> Tensor:
    if int(count) == 0:
        raise InvalidInput(
            "the mask is empty: 0 supervised tokens in the whole step; look at the mask rule and "
            "at whether responses are empty"
        )
    return count


DENOMINATORS: dict[str, Callable[[ScoredRollouts], Tensor]] = {
    "token_mean": token_mean,
    "sequence_sum": sequence_sum,
    "sequence_mean": sequence_mean,
    "group_mean": group_mean,
}
