"""Denominators: what the token losses of an optimizer step are divided by before they are summed.

They count tokens, responses and prompts, so that they are known before the rollouts are scored.

Shapes: B responses, T positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput


def token_mean(batch: Rollouts) -> Tensor:
    """Return (B,) the number of supervised tokens of the step: every token has equal weight."""
    return _check_not_empty(batch.mask.sum()).expand(len(batch))


def sequence_sum(batch: Rollouts) -> Tensor:
    """Return (B,) the number of responses: the loss is the mean of response sums, as in J.

    A response has weight in proportion to its length. Rows without a sampled token, which fill a
    batch, are no responses.

    Args:
        batch: Rollouts of the whole optimizer step.

    Returns:
        (B,) long denominators.
    """
    _check_not_empty(batch.mask.sum())
    return _responses(batch).expand(len(batch))


def sequence_mean(batch: Rollouts) -> Tensor:
    """Return (B,) B times a response's supervised tokens: every response has equal weight.

    The gradient is not that of E[mean_t K_t]: the derivative of the length is left out.

    Args:
        batch: Rollouts of the whole optimizer step.

    Returns:
        (B,) long denominators.
    """
    _check_not_empty(batch.mask.sum())
    return batch.mask.sum(1).clamp(min=1) * _responses(batch)


def group_mean(batch: Rollouts) -> Tensor:
    """Return (B,) the number of prompts times the tokens of a prompt's rollouts.

    Every prompt has equal weight; within a group long responses weigh more. (arXiv 2603.25562, eq.
    8.)

    Args:
        batch: Rollouts of the whole optimizer step.

    Returns:
        (B,) long denominators.
    """
    _check_not_empty(batch.mask.sum())
    prompts, group = batch.prompt.unique(return_inverse=True)
    tokens = torch.zeros_like(prompts).index_add_(0, group, batch.mask.sum(1))[group]
    sampled = torch.zeros_like(prompts).index_add_(0, group, batch.sampled.sum(1))
    return tokens.clamp(min=1) * (sampled > 0).sum()


def _responses(batch: Rollouts) -> Tensor:
    """Return the number of rows with a sampled token."""
    return batch.sampled.any(1).sum()


def _check_not_empty(count: Tensor) -> Tensor:
    """Return the number of supervised tokens after checking that it is positive."""
    if int(count) == 0:
        raise InvalidInput(
            "the mask is empty: 0 supervised tokens in the whole step; check the mask rules and "
            "whether the responses are empty"
        )
    return count


DENOMINATORS: dict[str, Callable[[Rollouts], Tensor]] = {
    "token_mean": token_mean,
    "sequence_sum": sequence_sum,
    "sequence_mean": sequence_mean,
    "group_mean": group_mean,
}
