"""The gradient probe over the ranks of torch.distributed: every rank gets the row of all sequences.

Ranks exchange the inputs of the token weights (`gather_batch`) and the sketches of sequences, never
gradients. Every rank has to call these functions in the same order. Prompts keep their ids:
rollouts of one prompt may be on several ranks.

Shapes: B responses of this rank, T its positions.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from diagnostics.batch import ScoredRollouts, concatenate, unflatten
from diagnostics.errors import InvalidInput
from diagnostics.gradients.probe import GradientSketches, LossGradients, concatenate_sketches
from diagnostics.tensor_fields import flatten


def gather_batch(batch: ScoredRollouts) -> tuple[ScoredRollouts, slice]:
    """Gather the batch of all ranks, in rank order, without supports.

    Cost: an all-gather of the per-token numbers, some 20 of them a token.

    Args:
        batch: This rank's rollouts.

    Returns:
        The full batch, and the slice of this rank's rows in it.
    """
    parts = all_gather_batches(replace(batch, support=None, baseline=None))
    start = sum(len(part) for part in parts[: distributed.get_rank()])
    return concatenate(parts), slice(start, start + len(batch))


def all_gather_batches(batch: ScoredRollouts) -> list[ScoredRollouts]:
    """Return every rank's batch with all its fields; all ranks must have the same fields."""
    columns = {name: all_gather_rows(x) for name, x in flatten(batch).items()}
    return [
        unflatten(batch, {name: x[rank] for name, x in columns.items()})
        for rank in range(distributed.get_world_size())
    ]


def all_gather_sketches(sketches: GradientSketches) -> GradientSketches:
    """Gather the gradient sketches of all ranks' sequences, in rank order."""
    columns = {name: all_gather_rows(x) for name, x in sketches.tensors().items()}
    ranks: list[dict[str, Any]] = [
        {name: x[rank] for name, x in columns.items()}
        for rank in range(distributed.get_world_size())
    ]
    return concatenate_sketches([replace(sketches, **rank_columns) for rank_columns in ranks])


def all_gather_loss_gradients(gradients: LossGradients) -> LossGradients:
    """Gather the loss gradients of all ranks' sequences, in rank order."""
    sketches, prompt = (
        torch.cat(all_gather_rows(x)) for x in (gradients.sketches, gradients.prompt)
    )
    squares = None if gradients.squares is None else torch.cat(all_gather_rows(gradients.squares))
    return LossGradients(sketches=sketches, prompt=prompt, squares=squares)


def all_gather_rows(x: Tensor) -> list[Tensor]:
    """Gather every rank's tensor; they may differ in their first two sizes.

    Args:
        x: This rank's tensor.

    Returns:
        Every rank's tensor, in rank order.

    Raises:
        InvalidInput: The ranks' tensors differ in another size.
    """
    num_ranks, payload = (
        distributed.get_world_size(),
        x.to(torch.uint8) if x.dtype == torch.bool else x,
    )
    shape = torch.tensor([*x.shape, *[-1] * (8 - x.dim())], device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(num_ranks)]
    distributed.all_gather(shapes, shape)
    sizes = [[n for n in rank_shape.tolist() if n >= 0] for rank_shape in shapes]
    if any(size[2:] != sizes[0][2:] or len(size) != x.dim() for size in sizes):
        raise InvalidInput(
            f"ranks hold tensors of shapes {sizes}; only rows and positions may differ"
        )
    largest = [max(axis) for axis in zip(*sizes, strict=True)]
    padded = payload.new_zeros(largest)
    padded[tuple(slice(n) for n in x.shape)] = payload
    gathered = [torch.empty_like(padded) for _ in range(num_ranks)]
    distributed.all_gather(gathered, padded)
    return [
        rows[tuple(map(slice, size))].to(x.dtype)
        for rows, size in zip(gathered, sizes, strict=True)
    ]
