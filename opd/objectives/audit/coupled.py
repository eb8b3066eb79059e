"""Mean gradients of losses that couple all rows of a batch, by sampling.

Shapes: N prefixes, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from opd.objectives.audit.gradients import loss_gradients
from opd.objectives.audit.matching import Mean
from opd.objectives.audit.worlds import Batch, World, make_batch
from opd.objectives.user_loss import UserLoss

BATCHES, ROWS = 600, 8
"""Batches of each world, and rows of a batch: groups of two of one prompt."""


def sampled_means(loss: UserLoss, worlds: Sequence[World], draws: int) -> list[Mean]:
    """Return means over sampled batches, times the number of supervised tokens.

    Args:
        loss: The loss.
        worlds: The worlds.
        draws: Calls to average.

    Returns:
        Means whose tolerance is three standard errors, relative to their norm.
    """
    return [_sampled_mean(loss, world, draws) for world in worlds]


def _sampled_mean(loss: UserLoss, world: World, draws: int) -> Mean:
    """Return the mean of one world."""
    shape = world.student.shape
    total, square = torch.zeros(shape).double(), torch.zeros(shape).double()
    batches = BATCHES if draws == 1 else BATCHES // 10
    for batch in _sampled_batches(world, batches):
        gradient = loss_gradients(loss, batch, draws=min(draws, 10)).student
        gradient = torch.where(batch.mask[..., None], gradient * batch.mask.sum(), 0.0)
        table = torch.zeros(shape).double()
        table.index_add_(0, batch.nodes.flatten(), gradient.flatten(0, 1))
        total += table
        square += table.square()
    mean = total / batches
    error = ((square / batches - mean.square()).clamp(min=0).sum() / batches).sqrt()
    tolerance = max(1e-4, 3 * float(error) / max(float(mean.norm()), 1e-300))
    return Mean(world, mean, float((square.sum() / batches).sqrt()), tolerance)


@lru_cache(maxsize=4)
def _sampled_batches(world: World, count: int) -> list[Batch]:
    """Return batches of groups of two sampled responses; they are kept for other losses."""
    generator = torch.Generator().manual_seed(23)
    probability = world.probabilities(world.student)
    batches = []
    for _ in range(count):
        first = torch.multinomial(probability, ROWS // 2, replacement=True, generator=generator)
        same_prompt = world.prompt[first][:, None] == world.prompt[None]
        second = torch.multinomial(probability * same_prompt, 1, generator=generator)[:, 0]
        rows = torch.stack([first, second], 1).flatten()
        batches.append(make_batch(world, rows, prompt=torch.arange(ROWS) // 2))
    return batches
