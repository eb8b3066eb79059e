"""The gradient probe over the ranks of torch.distributed: every rank gets the row of all sequences.

Ranks exchange what the weights of tokens are made of (`among`), and the sketches of sequences,
never gradients. Every rank has to call, in the same order. Prompts keep their ids: rollouts of one
prompt may be on several ranks.

Shapes: B responses of this rank, T its positions.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from diagnostics.batch import ScoredRollouts, concatenate, flatten, unflatten
from diagnostics.errors import InvalidInput
from diagnostics.gradients.probe import GradientSketches, LossGradients, joined


def among(batch: ScoredRollouts) -> tuple[ScoredRollouts, slice]:
    """The batch of all ranks, in their order, and where this one's rows are; without supports.

    Cost: an all-gather of the per-token numbers, some 20 of them a token.
    """
    parts = batches_of_ranks(replace(batch, support=None, baseline=None))
    start = sum(len(part) for part in parts[: distributed.get_rank()])
    return concatenate(parts), slice(start, start + len(batch))


def batches_of_ranks(batch: ScoredRollouts) -> list[ScoredRollouts]:
    """Every rank's batch, with all that is in it; all have to hold the same parts."""
    columns = {name: rows_of_ranks(x) for name, x in flatten(batch).items()}
    return [
        unflatten(batch, {name: x[rank] for name, x in columns.items()})
        for rank in range(distributed.get_world_size())
    ]


def across_ranks(part: GradientSketches) -> GradientSketches:
    """The measurement of all ranks' sequences, in the order of ranks."""
    columns = {name: rows_of_ranks(x) for name, x in part.tensors().items()}
    parts: list[dict[str, Any]] = [
        {name: x[rank] for name, x in columns.items()}
        for rank in range(distributed.get_world_size())
    ]
    return joined([replace(part, **changed) for changed in parts])


def loss_across_ranks(part: LossGradients) -> LossGradients:
    """The gradients of all ranks' sequences, in the order of ranks."""
    sketches, prompt = (torch.cat(rows_of_ranks(x)) for x in (part.sketches, part.prompt))
    squares = None if part.squares is None else torch.cat(rows_of_ranks(part.squares))
    return LossGradients(sketches=sketches, prompt=prompt, squares=squares)


def rows_of_ranks(x: Tensor) -> list[Tensor]:
    """Every rank's tensor; they may differ in their first two sizes.

    Raises:
      ValueError: the ranks' tensors differ in anything else.
    """
    ranks, wire = distributed.get_world_size(), x.to(torch.uint8) if x.dtype == torch.bool else x
    shape = torch.tensor([*x.shape, *[-1] * (8 - x.dim())], device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(ranks)]
    distributed.all_gather(shapes, shape)
    sizes = [[n for n in s.tolist() if n >= 0] for s in shapes]
    if any(size[2:] != sizes[0][2:] or len(size) != x.dim() for size in sizes):
        raise InvalidInput(
            f"ranks hold tensors of shapes {sizes}; only rows and positions may differ"
        )
    largest = [max(axis) for axis in zip(*sizes, strict=True)]
    padded = wire.new_zeros(largest)
    padded[tuple(slice(n) for n in x.shape)] = wire
    found = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(found, padded)
    return [y[tuple(map(slice, size))].to(x.dtype) for y, size in zip(found, sizes, strict=True)]
