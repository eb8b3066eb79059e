"""The gradient of a loss by the student's logits, row by row, and how rows of a batch combine.

A loss is called with whole batches. Where the gradients of parts of a batch add up, after
multiplication by what the loss divides by, one call on all responses of a world holds the
contribution of each, and means over everything that the student can sample are exact sums.

Shapes: N prefixes, R responses of a world, B rows of a batch, T positions, V vocabulary, U units.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.auditing.worlds import Batch, World, make_batch
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
    """Return the value of every parameter that a loss may ask for.

    Args:
        loss: The loss.
        batch: The batch.
        student: (B, T, V) the student's logits, with gradient.
        teacher: (B, T, V) the teacher's logits.

    Returns:
        Value of each parameter, tensors of their own so that a loss cannot change the batch. Only
        the student's values and `teacher_logits` can carry a gradient.
    """
    constants = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in batch.arguments.items()
        if name not in ("teacher_logits", "k")
    }
    teacher_logp = teacher.detach().log_softmax(-1)
    tokens, k = constants["tokens"], min(batch.arguments["k"], teacher.shape[-1])
    ids = teacher_logp.topk(k, -1).indices
    constants |= {
        "teacher_logits": teacher,
        "teacher_logp": teacher_logp.gather(-1, tokens[..., None])[..., 0],
        "teacher_topk": (ids, teacher_logp.gather(-1, ids)),
    }
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


@dataclass(frozen=True)
class Structure:
    """How the gradients of the parts of a batch combine."""

    unit: str
    """Smallest part whose gradient is its own: "row", "group" (rows of a prompt), or "batch"."""
    weighting: str
    """What the loss divides by, one of WEIGHTINGS."""
    centred: bool = False
    """For the unit "batch": whether the scores of a batch are centred or scaled to unit size."""
    draws: int = field(default=1)
    """Calls to average, for a loss that draws random numbers."""
    rows: int | None = None
    """Rows of a call where parts are enumerated; all at once if None."""


def batch_weight(batch: Batch, weighting: str) -> float:
    """Return what a loss of this weighting divides the sum over a batch by."""
    supervised = batch.mask
    if weighting == "one":
        return 1.0
    if weighting == "tokens":
        return float(supervised.sum())
    if weighting == "rows":
        return float(supervised.any(1).sum())
    return float(len(batch.arguments["prompt"][supervised.any(1)].unique()))


def find_structure(
    loss: UserLoss, world: World, draws: int, *, layout: Layout = same_layout, left: int = 0
) -> Structure:
    """Find the smallest unit whose gradient does not depend on the rest of the batch.

    Args:
        loss: The loss.
        world: A world with random lengths.
        draws: Calls to average.
        layout: Change of every batch before the call.
        left: Masked columns before the first token.

    Returns:
        The structure; unit "batch" and weighting "one" if no weighting makes the parts add up.
    """
    groups = _mixed_groups(world)
    rows = torch.cat(groups)
    prompt = torch.cat([torch.full((len(x),), i) for i, x in enumerate(groups)])
    full = layout(make_batch(world, rows, prompt=prompt, left=left))
    whole = loss_gradients(loss, full, draws=draws).student
    for unit in ("row", "group"):
        parts = list(_parts(unit, prompt))
        try:
            pieces = [
                (part, batch, loss_gradients(loss, batch, draws=draws).student)
                for part in parts
                for batch in (
                    layout(make_batch(world, rows[part], prompt=prompt[part], left=left)),
                )
            ]
        except InvalidInput:  # such as an advantage over the other rows of a group of one
            continue
        for weighting in WEIGHTINGS:
            ratio = batch_weight(full, weighting)
            if all(
                equal_gradients(
                    piece[batch.mask] * batch_weight(batch, weighting) / ratio,
                    whole[part][batch.mask],
                    draws,
                    scale=whole,
                )
                for part, batch, piece in pieces
            ):
                return Structure(unit, weighting, draws=draws)
    return Structure("batch", "one", centred=_is_centred(loss, world, draws), draws=draws)


def _mixed_groups(world: World) -> list[Tensor]:
    """Return groups of two and three responses of one prompt; the first has short ones only."""
    generator = torch.Generator().manual_seed(5)
    groups = []
    for index, size in enumerate((2, 3, 2, 3)):
        members = (world.prompt == index % world.num_prompts).nonzero()[:, 0]
        short = members[world.lengths[members].argmin()]
        if index == 0:
            members = members[world.lengths[members] < world.lengths.max()]
        chosen = members[torch.randperm(len(members), generator=generator)[: size - 1]]
        groups.append(torch.cat([short[None], chosen]))
    return groups


def _parts(unit: str, prompt: Tensor) -> Iterator[Tensor]:
    """Yield the rows of single units, and of two units together."""
    if unit == "row":
        yield from torch.arange(len(prompt)).split(1)
        yield torch.tensor([1, len(prompt) - 1])
        return
    for index in prompt.unique():
        yield (prompt == index).nonzero()[:, 0]
    yield (prompt < 2).nonzero()[:, 0]


def _is_centred(loss: UserLoss, world: World, draws: int) -> bool:
    """Return whether the scores of a batch have mean 0, or the same mean square in all batches.

    The score of a token is what multiplies the gradient of its log-probability.
    """
    means, squares = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(world.tokens), generator=generator)[:12]
        batch = make_batch(world, rows, prompt=torch.arange(12) // 3)
        gradient = loss_gradients(loss, batch, draws=draws).student
        scores = token_scores(batch, gradient)
        if scores is None:
            return False
        for per_token in (scores[batch.mask], row_scores(batch, scores)):
            means.append(float(per_token.mean().abs() / per_token.abs().max()))
            squares.append(float(per_token.square().sum() * len(per_token)))
    token_means, row_means = means[::2], means[1::2]
    centred = max(token_means) < 1e-4 or max(row_means) < 1e-4
    return centred or any(max(x) < (1 + 1e-3) * min(x) for x in (squares[::2], squares[1::2]))


def token_scores(batch: Batch, gradient: Tensor) -> Tensor | None:
    """Return (B, T) the factor of each token's score function; None if the loss is none of these.

    Args:
        batch: The batch.
        gradient: (B, T, V) gradient by the student's logits.

    Returns:
        (B, T) factors c with gradient = c (1_y - p), or None.
    """
    p = batch.student_logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(batch.arguments["tokens"], p.shape[-1]).to(p)
    direction = one_hot - p
    scores = (gradient * direction).sum(-1) / direction.square().sum(-1)
    rest = (gradient - scores[..., None] * direction)[batch.mask]
    scale = gradient[batch.mask].abs().max()
    return scores if float(rest.abs().max()) < 1e-4 * float(scale) else None


def row_scores(batch: Batch, scores: Tensor) -> Tensor:
    """Return (B,) the mean score of each row's tokens."""
    return (scores * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)


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
    student: Tensor | None = None,
    sampler: Tensor | None = None,
    layout: Layout = same_layout,
    left: int = 0,
) -> Units:
    """Compute the contribution of every response, or of every pair of responses to one prompt.

    Args:
        loss: The loss.
        world: The world.
        structure: How its parts combine; the unit is "row" or "group".
        student: (N, V) logits of the student; the world's if None.
        sampler: (N, V) logits of the sampler, which may be -inf; the student's if None.
        layout: Change of the batch before the call.
        left: Masked columns before the first token.

    Returns:
        The contributions, multiplied by what the loss divides by.
    """
    table = world.student if student is None else student
    response_probability = world.probabilities(table if sampler is None else sampler)
    possible = (response_probability > 0).nonzero()[:, 0]
    if structure.unit == "row":
        rows = possible[:, None]
        probability = response_probability[possible]
    else:
        rows, probability = _pairs(world, possible, response_probability)
    width = rows.shape[1]
    prompt = torch.arange(len(rows)).repeat_interleave(width)
    if structure.unit == "row":
        prompt = world.prompt[rows.flatten()]
    batch = make_batch(
        world, rows.flatten(), prompt=prompt, student=student, sampler=sampler, left=left
    )
    changed = layout(batch)
    gradient = additive_gradient(loss, changed, structure)
    contribution = torch.where(batch.mask[..., None], gradient, 0.0)
    return Units(
        logits=contribution.unflatten(0, (-1, width)),
        nodes=batch.nodes.unflatten(0, (-1, width)),
        mask=batch.mask.unflatten(0, (-1, width)),
        probability=probability,
    )


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
