"""Batches put together from several, or from the tensors of another process.

Shapes: B responses, T positions.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.tensor_fields import TensorFields, flatten

AnyRollouts = TypeVar("AnyRollouts", bound=Rollouts)


def concatenate(batches: Sequence[AnyRollouts]) -> AnyRollouts:
    """Concatenate the rows of batches, padded on the right with masked zeros to the longest."""
    if not batches:
        raise InvalidInput("no batches to concatenate")
    width = max(b.tokens.shape[1] for b in batches)
    if any(b.sampled_mask is not None for b in batches):
        batches = [b.with_fields(sampled_mask=b.sampled) for b in batches]
    flat = [flatten(b) for b in batches]
    if any(f.keys() != flat[0].keys() for f in flat):
        raise InvalidInput(
            "batches have different fields; give all of them the same optional fields, among "
            f"{sorted(set.union(*map(set, flat)))}"
        )

    def pad(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x
        tail = x.new_zeros((x.shape[0], width - x.shape[1], *x.shape[2:]))
        return torch.cat([x, tail], 1)

    return unflatten(batches[0], {k: torch.cat([pad(f[k]) for f in flat]) for k in flat[0]})


def unflatten(template: AnyRollouts, flat: dict[str, Tensor]) -> AnyRollouts:
    """Return a batch with other tensors.

    Args:
        template: The batch that gives all other fields.
        flat: Tensors by name, as `flatten` names them.

    Returns:
        The new batch.
    """
    changes: dict[str, Any] = {k: v for k, v in flat.items() if "." not in k}
    for name, part in template._tensors().items():
        if isinstance(part, TensorFields):
            part_fields = {k: flat[f"{name}.{k}"] for k in part._tensors()}
            changes[name] = part.with_fields(**part_fields)
    return template.with_fields(**changes)
