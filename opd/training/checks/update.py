"""Whether an optimizer step did what it should: numbers for the row from a sample of the weights.

At most `TENSORS` weights are looked at, and of each `ELEMENTS` numbers that are spread over it, so
that the cost does not grow with the model. Everything stays on the device.

Shapes: n sampled numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd.config.settings import Config
from opd.runtime import distributed
from opd.teachers.pair import ModelPair
from opd.training.optimizer import Optimizer

TENSORS, ELEMENTS = 16, 256


def chosen(count: int) -> list[int]:
    """At most TENSORS numbers below `count`, spread evenly, the first and the last among them."""
    if count <= TENSORS:
        return list(range(count))
    return [round(i * (count - 1) / (TENSORS - 1)) for i in range(TENSORS)]


def numbers_of(weights: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """(n,) float32 sample of this process's part of the weights; 0 where one is None."""
    return torch.cat([_spread(x, y) for x, y in zip(weights, like, strict=True)]).float()


def _spread(weight: Tensor | None, like: Tensor) -> Tensor:
    own = _local(like)
    stride = max(1, own.numel() // ELEMENTS)
    if weight is None:
        count = min(ELEMENTS, len(range(0, own.numel(), stride)))
        return torch.zeros(count, device=own.device)
    return _local(weight).detach().reshape(-1)[::stride][:ELEMENTS].float()


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True, eq=False)
class Before:
    """What `after_step` compares with: (n,) gradient and float32 weights; reached: see there."""

    gradient: Tensor
    weights: Tensor
    reached: Tensor


def before_step(optimizer: Optimizer) -> Before:
    """The sample just before the optimizer step, with the step's whole gradient."""
    masters = [optimizer.masters[i] for i in chosen(len(optimizer.masters))]
    gradients = [x.grad for x in masters]
    parts = [_spread(g, x) for g, x in zip(gradients, masters, strict=True)]
    flags = distributed.summed(torch.stack([(part != 0).any() for part in parts]).float())
    reached = (flags > 0).double().mean()
    return Before(torch.cat(parts), numbers_of(masters, masters), reached)


def after_step(optimizer: Optimizer, before: Before, taken: bool) -> dict[str, Tensor]:
    """Columns of the row, after an optimizer step; NaN, and so no readings, if it was not taken.

    moved_share: of the numbers with a gradient, those that the step changed, healthy 1.00;
    reached_share: of the weights, those with any gradient; unpublished_share: of the numbers, those
    in which the network is not its optimizer's rounded copy, healthy 0.
    """
    places = chosen(len(optimizer.masters))
    masters = [optimizer.masters[i] for i in places]
    live = [optimizer.live[i] for i in places]
    now = numbers_of(masters, masters)
    pulled = before.gradient != 0
    moved = (now != before.weights) & pulled
    rounded = [x.to(y.dtype) for x, y in zip(map(_local, masters), map(_local, live), strict=True)]
    wrong = numbers_of(live, live) != numbers_of(rounded, rounded)
    columns = {
        "update/moved_share": (moved.sum().double() / pulled.sum().double()).round(decimals=2),
        "update/reached_share": before.reached,
        "update/unpublished_share": wrong.double().mean(),
    }
    return columns if taken else {k: torch.full_like(x, math.nan) for k, x in columns.items()}


def kept_gradients(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Some weights, each with its gradient after a micro-batch, for `lost_share`."""
    masters = [optimizer.masters[i] for i in chosen(len(optimizer.masters))]
    return [(x, x.grad) for x in masters if x.grad is not None and not isinstance(x, DTensor)]


def lost_share(kept: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of the gradients of a first micro-batch to which the others were not added.

    A later backward pass adds to the tensor that is there, so it is lost where another stands.
    """
    lost = [weight.grad is not gradient for weight, gradient in kept]
    return sum(lost) / len(lost) if lost else 0.0


def leftover(optimizer: Optimizer) -> float:
    """1 if some weight has a gradient before the first backward pass of a step, else 0."""
    weights = (*optimizer.live, *optimizer.masters)
    return float(any(weight.grad is not None for weight in weights))


def frozen_teacher(config: Config, pair: ModelPair) -> tuple[list[Tensor], Tensor] | None:
    """Some of the teacher's weights and (n,) their numbers; None of one that moves or is remote."""
    if config.teacher == "ema" or pair.remote is not None:
        return None
    weights = list(pair.teacher.network.parameters())
    if config.teacher == "base":  # the student's own weights, beside its adapters
        weights = [weight for weight in weights if not weight.requires_grad]
    weights = [weights[i] for i in chosen(len(weights))]
    return weights, numbers_of(weights, weights)


def changed_share(sample: tuple[list[Tensor], Tensor]) -> Tensor:
    """Share of the numbers of `frozen_teacher` that are not what they were."""
    weights, numbers = sample
    return (numbers_of(weights, weights).to(numbers.device) != numbers).double().mean()
