"""How the gradients of the parts of a batch combine: what a loss divides by, and its smallest unit.

Shapes: B rows of a batch, T positions, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.audit.gradients import (
    WEIGHTINGS,
    Layout,
    equal_gradients,
    loss_gradients,
    same_layout,
)
from opd.objectives.audit.worlds import Batch, World, make_batch
from opd.objectives.user_loss import UserLoss


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
    full, parts_by_unit = _trial_batches(world, left)
    full = layout(full)
    whole = loss_gradients(loss, full, draws=draws).student
    for unit, parts in parts_by_unit.items():
        try:
            pieces = [
                (part, batch, loss_gradients(loss, batch, draws=draws).student)
                for part, unchanged in parts
                for batch in (layout(unchanged),)
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


@lru_cache(maxsize=8)
def _trial_batches(world: World, left: int) -> tuple[Batch, dict[str, list[tuple[Tensor, Batch]]]]:
    """Return a batch of groups, and its parts by unit; they are kept for other layouts and losses.

    Args:
        world: A world with random lengths.
        left: Masked columns before the first token.

    Returns:
        The whole batch; and for "row" and "group" the rows of each part and its batch.
    """
    groups = _mixed_groups(world)
    rows = torch.cat(groups)
    prompt = torch.cat([torch.full((len(x),), i) for i, x in enumerate(groups)])
    parts_by_unit = {
        unit: [
            (part, make_batch(world, rows[part], prompt=prompt[part], left=left))
            for part in _parts(unit, prompt)
        ]
        for unit in ("row", "group")
    }
    return make_batch(world, rows, prompt=prompt, left=left), parts_by_unit


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
