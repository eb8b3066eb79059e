"""Checks of an optimizer step on a sample of the weights.

At most `MAX_TENSORS` weights are sampled, with `MAX_ELEMENTS` evenly spaced elements each, so that
the cost does not grow with the model. Everything stays on the device.

Shapes: n sampled elements.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd.runtime import distributed
from opd.teachers.teacher import Teacher
from opd.training.optimizer import Optimizer

MAX_TENSORS, MAX_ELEMENTS = 16, 256


def sampled_indices(count: int) -> list[int]:
    """Return at most MAX_TENSORS evenly spaced indices below `count`, with both ends."""
    if count <= MAX_TENSORS:
        return list(range(count))
    return [round(i * (count - 1) / (MAX_TENSORS - 1)) for i in range(MAX_TENSORS)]


def sample_values(weights: Sequence[Tensor | None], references: Sequence[Tensor]) -> Tensor:
    """Return the (n,) float32 sample of this rank's shards of the weights; 0 where one is None."""
    return torch.cat(
        [_strided_sample(x, y) for x, y in zip(weights, references, strict=True)]
    ).float()


def _strided_sample(weight: Tensor | None, reference: Tensor) -> Tensor:
    """Return evenly spaced elements of this rank's shard; zeros if the tensor is None."""
    local = _local_shard(reference)
    stride = max(1, local.numel() // MAX_ELEMENTS)
    if weight is None:
        count = min(MAX_ELEMENTS, len(range(0, local.numel(), stride)))
        return torch.zeros(count, device=local.device)
    return _local_shard(weight).detach().reshape(-1)[::stride][:MAX_ELEMENTS].float()


def _local_shard(weight: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True, eq=False)
class WeightsBeforeStep:
    """Sampled weights and gradients before an optimizer step, for `columns_after_step`."""

    gradient: Tensor
    """(n,) gradients."""
    weights: Tensor
    """(n,) float32 master weights."""
    reached: Tensor
    """0-d share of the sampled weights with a nonzero gradient."""


def sample_before_step(optimizer: Optimizer) -> WeightsBeforeStep:
    """Sample weights and gradients just before the optimizer step, after the all-reduce."""
    masters = [optimizer.master_weights[i] for i in sampled_indices(len(optimizer.master_weights))]
    gradients = [weight.grad for weight in masters]
    parts = [_strided_sample(g, weight) for g, weight in zip(gradients, masters, strict=True)]
    flags = distributed.all_reduce_sum(torch.stack([(part != 0).any() for part in parts]).float())
    reached = (flags > 0).double().mean()
    return WeightsBeforeStep(torch.cat(parts), sample_values(masters, masters), reached)


def columns_after_step(
    optimizer: Optimizer, snapshot: WeightsBeforeStep, applied: bool
) -> dict[str, Tensor]:
    """Compare sampled weights before and after an optimizer step.

    Args:
        optimizer: Optimizer after the step.
        snapshot: Sample before the step.
        applied: Whether the step was applied.

    Returns:
        Columns of the row; NaN if the step was skipped. moved_share: share of elements with a
        gradient that changed, healthy 1.00. reached_share: share of weights with any gradient.
        unpublished_share: share of elements whose model weight is not the rounded master weight,
        healthy 0.
    """
    indices = sampled_indices(len(optimizer.master_weights))
    masters = [optimizer.master_weights[i] for i in indices]
    model_weights = [optimizer.model_weights[i] for i in indices]
    values = sample_values(masters, masters)
    has_gradient = snapshot.gradient != 0
    has_moved = (values != snapshot.weights) & has_gradient
    rounded_masters = [
        value.to(y.dtype)
        for value, y in zip(
            map(_local_shard, masters), map(_local_shard, model_weights), strict=True
        )
    ]
    is_unpublished = sample_values(model_weights, model_weights) != sample_values(
        rounded_masters, rounded_masters
    )
    columns = {
        "update/moved_share": (has_moved.sum().double() / has_gradient.sum().double()).round(
            decimals=2
        ),
        "update/reached_share": snapshot.reached,
        "update/unpublished_share": is_unpublished.double().mean(),
    }
    return (
        columns
        if applied
        else {name: torch.full_like(value, math.nan) for name, value in columns.items()}
    )


def sampled_gradients(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Return sampled weights and their gradients after a micro-batch (`lost_gradient_share`)."""
    masters = [optimizer.master_weights[i] for i in sampled_indices(len(optimizer.master_weights))]
    return [
        (weight, weight.grad)
        for weight in masters
        if weight.grad is not None and not isinstance(weight, DTensor)
    ]


def lost_gradient_share(first_gradients: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Compute the share of first-micro-batch gradients to which later ones were not added.

    A later backward pass accumulates in place: if a weight has another gradient tensor afterwards,
    the first gradient was lost.

    Args:
        first_gradients: Weights with their gradients after the first micro-batch.

    Returns:
        The share; 0 without gradients.
    """
    is_lost = [weight.grad is not gradient for weight, gradient in first_gradients]
    return sum(is_lost) / len(is_lost) if is_lost else 0.0


def has_leftover_gradient(optimizer: Optimizer) -> float:
    """Return 1 if a weight has a gradient before a step's first backward pass, otherwise 0."""
    weights = (*optimizer.model_weights, *optimizer.master_weights)
    return float(any(weight.grad is not None for weight in weights))


def sample_teacher_weights(teacher: Teacher) -> tuple[list[Tensor], Tensor] | None:
    """Sample a teacher's frozen weights: tensors and (n,) values.

    Args:
        teacher: The teacher.

    Returns:
        The tensors and their values; None if it has none in this process.
    """
    weights = teacher.frozen_weights()
    if not weights:
        return None
    weights = [weights[i] for i in sampled_indices(len(weights))]
    return weights, sample_values(weights, weights)


def changed_weight_share(sample: tuple[list[Tensor], Tensor]) -> Tensor:
    """Return the share of values from `sample_teacher_weights` that have changed."""
    weights, numbers = sample
    return (sample_values(weights, weights).to(numbers.device) != numbers).double().mean()
