"""Contributions of everything that a student can sample: their mean and their variance.

Shapes: N prefixes, R responses of a world, U units of W rows, T positions, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from opd.objectives.audit.gradients import (
    SLOW_CALL,
    TRIAL_ROWS,
    Layout,
    loss_gradients,
    same_layout,
)
from opd.objectives.audit.structure import Structure, batch_weight
from opd.objectives.audit.worlds import Batch, World, make_batch
from opd.objectives.user_loss import UserLoss

KEPT_RESPONSES = 150
"""Responses of a world up to which the batch of all units is kept: pairs of more need memory."""


@dataclass(frozen=True, eq=False)
class Units:
    """Contributions of everything that can be sampled, each with its probability."""

    logits: Tensor
    """(U, W, T, V) contribution of a unit's W rows by their logits."""
    nodes: Tensor
    """(U, W, T) row of the tables at each position."""
    mask: Tensor
    """(U, W, T) bool, supervised tokens."""
    probability: Tensor
    """(U,) probability of the unit."""

    @property
    def lengths(self) -> Tensor:
        """(U, W) supervised tokens of each row."""
        return self.mask.sum(-1)


def enumerate_units(
    loss: UserLoss,
    world: World,
    structure: Structure,
    *,
    sampler: Tensor | None = None,
    layout: Layout = same_layout,
    left: int = 0,
) -> Units:
    """Compute the contribution of every response, or of every pair of responses to one prompt.

    Args:
        loss: The loss.
        world: The world.
        structure: How its parts combine; the unit is "row" or "group".
        sampler: (N, V) logits of the sampler, which may be -inf; the student's if None.
        layout: Change of the batch before the call.
        left: Masked columns before the first token.

    Returns:
        The contributions, multiplied by what the loss divides by.
    """
    if sampler is None and len(world.tokens) <= KEPT_RESPONSES:
        batch, probability = _on_policy_units(world, structure.unit, left)
    else:
        batch, probability = _unit_batch(world, structure.unit, left, sampler)
    width = len(batch.nodes) // len(probability)
    gradient = additive_gradient(loss, layout(batch), structure)
    contribution = torch.where(batch.mask[..., None], gradient, 0.0)
    return Units(
        logits=contribution.unflatten(0, (-1, width)),
        nodes=batch.nodes.unflatten(0, (-1, width)),
        mask=batch.mask.unflatten(0, (-1, width)),
        probability=probability,
    )


def _unit_batch(world: World, unit: str, left: int, sampler: Tensor | None) -> tuple[Batch, Tensor]:
    """Return the batch of all units that can be sampled, and (U,) their probabilities."""
    response_probability = world.probabilities(world.student if sampler is None else sampler)
    possible = (response_probability > 0).nonzero()[:, 0]
    if unit == "row":
        rows, prompt = possible, world.prompt[possible]
        probability = response_probability[possible]
    else:
        pairs, probability = _pairs(world, possible, response_probability)
        rows, prompt = pairs.flatten(), torch.arange(len(pairs)).repeat_interleave(2)
    return make_batch(world, rows, prompt=prompt, sampler=sampler, left=left), probability


@lru_cache(maxsize=16)
def _on_policy_units(world: World, unit: str, left: int) -> tuple[Batch, Tensor]:
    """Return the same for the world's student, kept for other layouts, factors and losses."""
    return _unit_batch(world, unit, left, None)


def _pairs(world: World, possible: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Return (U, 2) pairs of responses to one prompt, and (U,) their probabilities."""
    rows, weights = [], []
    for prompt in range(world.num_prompts):
        members = possible[world.prompt[possible] == prompt]
        left, right = torch.triu_indices(len(members), len(members)).unbind(0)
        left, right = members[left], members[right]
        both = probability[left] * probability[right] * world.num_prompts
        rows.append(torch.stack([left, right], 1))
        weights.append(torch.where(left == right, both, 2 * both))
    return torch.cat(rows), torch.cat(weights)


def additive_gradient(loss: UserLoss, batch: Batch, structure: Structure) -> Tensor:
    """Return the gradient of a batch whose parts add up, times what the loss divides by.

    Args:
        loss: The loss.
        batch: The batch; `structure.rows` rows of it hold whole units.
        structure: How its parts combine.

    Returns:
        (B, T, V) contributions.
    """
    parts = []
    for part in torch.arange(len(batch.nodes)).split(structure.rows or len(batch.nodes)):
        rows = batch if structure.rows is None else batch.select(part)
        gradient = loss_gradients(loss, rows, draws=structure.draws).student
        parts.append(gradient * batch_weight(rows, structure.weighting))
    return torch.cat(parts)


def with_fast_calls(loss: UserLoss, world: World, structure: Structure) -> Structure:
    """Choose how many rows a call has: a loop over pairs of rows is slow on large batches.

    Args:
        loss: The loss.
        world: A world.
        structure: How rows combine; the unit is "row" or "group".

    Returns:
        The structure with `rows` set where that takes less than half of the time.
    """
    responses = torch.arange(TRIAL_ROWS) % len(world.tokens)
    prompt = torch.arange(len(responses)) // 2
    batch = make_batch(world, responses, prompt=prompt)
    seconds: dict[int | None, float] = {}
    for rows in (None, 16):
        start = time.perf_counter()
        additive_gradient(loss, batch, replace(structure, rows=rows, draws=1))
        seconds[rows] = time.perf_counter() - start
        if rows is None and seconds[rows] < SLOW_CALL:
            return structure
    return replace(structure, rows=16) if 2 * seconds[16] < seconds[None] else structure


FACTORS: dict[str, Callable[[Units], Tensor]] = {
    "one": lambda units: torch.ones_like(units.lengths, dtype=torch.float64),
    "length": lambda units: units.lengths.double(),
    "unit_tokens": lambda units: (
        units.lengths.sum(1, keepdim=True).expand_as(units.lengths).double()
    ),
}
"""Factors of a row that undo a mean over its tokens, or over those of its group."""


def mean_gradient(units: Units, num_nodes: int, factor: str = "one") -> Tensor:
    """Return (N, V) the mean contribution of a unit.

    Args:
        units: Contributions.
        num_nodes: N.
        factor: One of FACTORS.

    Returns:
        (N, V) gradient by the student's table.
    """
    weight = units.probability[:, None] * FACTORS[factor](units)
    weighted = units.logits * weight[..., None, None]
    mean = weighted.new_zeros(num_nodes, weighted.shape[-1])
    return mean.index_add_(0, units.nodes.flatten(), weighted.flatten(0, 2))


def total_variance(units: Units, num_nodes: int, factor: str = "one") -> float:
    """Return the sum of the variances of a unit's contribution over all parameters.

    Args:
        units: Contributions.
        num_nodes: N.
        factor: One of FACTORS.

    Returns:
        E |g|^2 - |E g|^2.
    """
    scaled = units.logits * FACTORS[factor](units)[..., None, None]
    square = scaled.square().sum((1, 2, 3))
    if scaled.shape[1] == 2:  # rows of a pair meet at the prefixes that they share
        (left, right), (a, b) = scaled.unbind(1), units.nodes.unbind(1)
        shared = (a == b) & units.mask[:, 0] & units.mask[:, 1]
        square = square + 2 * ((left * right).sum(-1) * shared).sum(-1)
    mean = mean_gradient(units, num_nodes, factor)
    return float((units.probability * square).sum() - mean.square().sum())
