"""The gradient of a loss by the student's logits, row by row, and how rows of a batch combine.

A loss is called with whole batches. Where the gradients of parts of a batch add up, after
multiplication by what the loss divides by, one call on all responses of a world holds the
contribution of each, and means over everything that the student can sample are exact sums.

Shapes: N prefixes, R responses of a world, B rows of a batch, T positions, V vocabulary, U units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.audit.worlds import Batch
from opd.objectives.user_loss import UserLoss, loss_values

WEIGHTINGS = ("one", "tokens", "rows", "prompts")
"""What a loss may divide by: nothing, or the number of supervised tokens, rows or prompts."""
EXACT = 1e-5
"""Relative difference below which two gradients are equal: losses may compute in float32."""
NOISY = 0.3
"""The same for averages of a loss that draws random numbers, of the norm."""
TRIAL_ROWS = 400
"""Rows of a call as large as those in which parts are enumerated."""
SLOW_CALL = 0.1
"""Seconds of such a call beyond which smaller calls are tried."""
TINY = 1e-9
"""Gradient, relative to the largest, below which there is none."""


Layout = Callable[[Batch], Batch]
"""Change of a batch before a loss sees it."""


def same_layout(batch: Batch) -> Batch:
    """Return the batch."""
    return batch


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one call of a loss."""

    student: Tensor
    """(B, T, V) by the student's logits."""
    teacher: Tensor | None
    """(B, T, V) by the teacher's logits, if asked for."""
    has_graph: bool
    """Whether a graph reached the student."""


def loss_gradients(
    loss: UserLoss,
    batch: Batch,
    *,
    teacher_requires_grad: bool = False,
    draws: int = 1,
) -> Gradients:
    """Call a loss on a batch and differentiate it.

    Args:
        loss: The loss.
        batch: The batch.
        teacher_requires_grad: Whether the teacher's logits require grad, too.
        draws: Calls whose gradients are averaged, for a loss that draws random numbers.

    Returns:
        The gradients, zero where no graph reaches.

    Raises:
        InvalidInput: The loss returns something else than a scalar, or fails.
    """
    total = torch.zeros_like(batch.student_logits)
    teacher_total = torch.zeros_like(batch.student_logits)
    has_graph = False
    for _ in range(draws):
        student = batch.student_logits.clone().requires_grad_()
        teacher = batch.arguments["teacher_logits"].clone().requires_grad_(teacher_requires_grad)
        value = call_loss(loss, argument_values(loss, batch, student, teacher))
        leaves = [student, teacher] if teacher_requires_grad else [student]
        if value.requires_grad:
            parts = differentiate(loss, value, leaves)
            has_graph = has_graph or parts[0] is not None
            total += 0 if parts[0] is None else parts[0] / draws
            if teacher_requires_grad and parts[1] is not None:
                teacher_total += parts[1] / draws
    return Gradients(total, teacher_total if teacher_requires_grad else None, has_graph)


def differentiate(loss: UserLoss, value: Tensor, leaves: list[Tensor]) -> tuple[Any, ...]:
    """Return the gradients of a loss's value, None where no graph reaches.

    Args:
        loss: The loss, for messages.
        value: Its value.
        leaves: Tensors that require grad.

    Returns:
        One gradient or None per leaf.

    Raises:
        InvalidInput: The value cannot be differentiated.
    """
    try:
        return torch.autograd.grad(value, leaves, allow_unused=True)
    except RuntimeError as error:
        raise InvalidInput(
            f"the loss {loss.name} cannot be differentiated ({' '.join(str(error).split())})"
        ) from error


def argument_values(
    loss: UserLoss, batch: Batch, student: Tensor, teacher: Tensor
) -> dict[str, Any]:
    """Return the value of every parameter that a loss asks for, and those that come with them.

    Args:
        loss: The loss.
        batch: The batch.
        student: (B, T, V) the student's logits, with gradient.
        teacher: (B, T, V) the teacher's logits.

    Returns:
        Value of each parameter, tensors of their own so that a loss cannot change the batch. Only
        the student's values and `teacher_logits` can carry a gradient.
    """
    asks = {*loss.asks}
    constants: dict[str, Any] = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in batch.arguments.items()
        if name in asks | {"tokens"} and name not in ("teacher_logits", "k")
    }
    constants["teacher_logits"] = teacher
    k = min(batch.arguments["k"], teacher.shape[-1])
    if {"teacher_logp", "teacher_topk"} & asks:
        teacher_logp = teacher.detach().log_softmax(-1)
        ids = teacher_logp.topk(k, -1).indices
        tokens = constants["tokens"][..., None]
        constants["teacher_logp"] = teacher_logp.gather(-1, tokens)[..., 0]
        constants["teacher_topk"] = ids, teacher_logp.gather(-1, ids)
    values = loss_values(loss, student, constants, k)
    return {name: _rolled(value, batch.rolls.get(name, 0)) for name, value in values.items()}


def _rolled(value: Any, by: int) -> Any:
    """Return a tensor, or each of a tuple, moved along the positions."""
    if by == 0:
        return value
    if isinstance(value, tuple):
        return tuple(_rolled(part, by) for part in value)
    return value.roll(by, dims=1)


def call_loss(loss: UserLoss, values: dict[str, Any]) -> Tensor:
    """Call a loss and check that it returns a scalar.

    Args:
        loss: The loss.
        values: Value of each parameter.

    Returns:
        Scalar, with or without gradient.

    Raises:
        InvalidInput: The loss failed, or returned something else.
    """
    try:
        value = loss.function(**{name: values[name] for name in loss.asks})
    except InvalidInput:
        raise
    except Exception as error:  # a user's function can raise anything
        shape = tuple(values["student_logits"].shape)
        raise InvalidInput(
            f"the loss {loss.name} failed with {type(error).__name__}: {error} on student logits "
            f"of {shape}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = (
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        raise InvalidInput(
            f"the loss {loss.name} returned {what}; it must return a scalar tensor, such as "
            "(losses * mask).sum() / mask.sum()"
        )
    return value.reshape(())


def equal_gradients(a: Tensor, b: Tensor, draws: int, *, scale: Tensor | None = None) -> bool:
    """Return whether two gradients are equal, up to rounding or to the noise of random draws.

    Args:
        a: A gradient.
        b: Another one, of the same shape.
        draws: Calls that were averaged: more than 1 for a loss that draws random numbers.
        scale: Gradient whose largest entry is the unit; both if None.

    Returns:
        Whether they agree; entries that are not finite agree with each other.
    """
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()) or not bool(finite.any()):
        return torch.equal(a.isfinite(), b.isfinite())
    a, b = a[finite], b[finite]
    if scale is not None:
        scale = scale[scale.isfinite()]
    if draws > 1:
        return float((a - b).norm()) <= NOISY * max(float(a.norm()), float(b.norm()))
    unit = max(float(x.abs().max()) for x in ((a, b) if scale is None else (scale,)))
    return float((a - b).abs().max()) <= EXACT * unit
