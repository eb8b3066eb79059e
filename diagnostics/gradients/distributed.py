"""The gradient probe over the ranks of torch.distributed: every rank gets the row of all sequences.

Ranks exchange the inputs of the token weights (`gather_batch`) and the sketches of sequences, never
gradients. Every rank has to call these functions in the same order. Prompts keep their ids:
rollouts of one prompt may be on several ranks.

Shapes: B responses of this rank, T its positions.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.concatenation import AnyRollouts, concatenate, unflatten
from diagnostics.errors import InvalidInput
from diagnostics.gradients.probe import GradientSketches, LossGradients, concatenate_sketches
from diagnostics.tensor_fields import flatten

MAX_DIMENSIONS = 8
"""Maximum number of dimensions of a tensor that ranks exchange."""


def gather_batch(batch: ScoredRollouts) -> tuple[ScoredRollouts, slice]:
    """Gather the batch of all ranks, in rank order, without supports.

    Cost: an all-gather of the per-token numbers, some 20 of them a token.

    Args:
        batch: This rank's rollouts.

    Returns:
        The full batch, and the slice of this rank's rows in it.
    """
    return gather_rollouts(batch.with_fields(support=None, baseline=None))


def gather_rollouts(batch: AnyRollouts) -> tuple[AnyRollouts, slice]:
    """Gather the rollouts of all ranks, in rank order, with all their fields.

    Args:
        batch: This rank's rollouts.

    Returns:
        The full batch, and the slice of this rank's rows in it.
    """
    parts = all_gather_batches(batch)
    start = sum(len(part) for part in parts[: distributed.get_rank()])
    return concatenate(parts), slice(start, start + len(batch))


def all_gather_batches(batch: AnyRollouts) -> list[AnyRollouts]:
    """Return every rank's batch with all its fields; all ranks must have the same fields."""
    return [unflatten(batch, columns) for columns in all_gather_columns(flatten(batch))]


def all_gather_sketches(sketches: GradientSketches) -> GradientSketches:
    """Gather the gradient sketches of all ranks' sequences, in rank order."""
    ranks: list[dict[str, Any]] = [*all_gather_columns(sketches.tensors())]
    return concatenate_sketches([replace(sketches, **columns) for columns in ranks])


def all_gather_loss_gradients(gradients: LossGradients) -> LossGradients:
    """Gather the loss gradients of all ranks' sequences, in rank order."""
    columns = {"sketches": gradients.sketches, "prompt": gradients.prompt}
    if gradients.squares is not None:
        columns["squares"] = gradients.squares
    ranks = all_gather_columns(columns)
    return replace(gradients, **{name: torch.cat([x[name] for x in ranks]) for name in columns})


def all_gather_rows(x: Tensor) -> list[Tensor]:
    """Gather every rank's tensor, in rank order; see `all_gather_columns`."""
    return [columns["x"] for columns in all_gather_columns({"x": x})]


def all_gather_columns(columns: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Gather every rank's tensors with two collective operations, one of sizes and one of bytes.

    Args:
        columns: This rank's tensors, on one device; the ranks' may differ in their first two sizes.

    Returns:
        Every rank's tensors, in rank order.

    Raises:
        InvalidInput: The ranks' tensors differ in another size.
    """
    tensors = list(columns.values())
    own_shapes = torch.tensor(
        [[*x.shape, *[-1] * (MAX_DIMENSIONS - x.dim())] for x in tensors], device=tensors[0].device
    )
    shapes = [
        [[n for n in size if n >= 0] for size in rank_shapes.tolist()]
        for rank_shapes in all_gather_same_size(own_shapes)
    ]
    for sizes in zip(*shapes, strict=True):
        if any(size[2:] != sizes[0][2:] or len(size) != len(sizes[0]) for size in sizes):
            raise InvalidInput(
                f"ranks hold tensors of shapes {list(sizes)}; only rows and positions may differ"
            )
    num_bytes = [
        [math.prod(size) * x.element_size() for size, x in zip(sizes, tensors, strict=True)]
        for sizes in shapes
    ]
    own_bytes = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors])
    padded = own_bytes.new_zeros(max(map(sum, num_bytes)))
    padded[: len(own_bytes)] = own_bytes
    return [
        {
            name: part.clone().view(x.dtype).reshape(size)  # a copy begins at a multiple of 8 bytes
            for (name, x), part, size in zip(
                columns.items(), rank_bytes[: sum(counts)].split(counts), sizes, strict=True
            )
        }
        for rank_bytes, counts, sizes in zip(
            all_gather_same_size(padded), num_bytes, shapes, strict=True
        )
    ]


def all_gather_same_size(x: Tensor) -> list[Tensor]:
    """Gather every rank's tensor, in rank order; all have the size of this one."""
    gathered = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, x)
    return gathered
