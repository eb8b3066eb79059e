"""The base of the dataclasses of a batch: tensors that are selected, moved and checked together.

Shapes: B responses, T response positions; every field is (B, ...) or (B, T, ...).
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from diagnostics.missing import Missing


class TensorFields:
    """Row selection, device moves and flattening for the frozen dataclasses of a batch."""

    def _tensors(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor | TensorFields)}

    def _map(self, function: Any) -> Self:
        mapped = {
            k: v._map(function) if isinstance(v, TensorFields) else function(v)
            for k, v in self._tensors().items()
        }
        return self.with_fields(**mapped)

    def with_fields(self, **values: Any) -> Self:
        """Return a copy with other values of these fields."""
        return type(self)(**{**vars(self), **values})

    def rows(self, index: slice | Tensor | Sequence[int]) -> Self:
        """Select responses, in every field.

        Args:
            index: Slice, list or long tensor of row numbers.

        Returns:
            The selected rows.
        """
        if isinstance(index, Sequence):
            index = torch.as_tensor(index, dtype=None if len(index) else torch.long)
        return self._map(lambda x: x[index])

    def to(self, device: str | torch.device) -> Self:
        """Move every tensor to a device."""
        return self._map(lambda x: x.to(device))

    def positions(self, stop: int) -> Self:
        """Keep the first `stop` response positions."""
        return self._map(lambda x: x[:, :stop] if x.dim() > 1 else x)


def check_tensor(name: str, x: Any, shape: tuple[int, ...], kind: str) -> None:
    """Check the shape and the kind of dtype of a tensor, if it is not missing.

    Args:
        name: Name of the field, for messages.
        x: Its value.
        shape: The expected shape.
        kind: "float", "long" or "bool".

    Raises:
        InvalidInput: It has another shape.
        TypeError: It is no tensor, or of another dtype.
    """
    if isinstance(x, Missing):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}, expected a tensor")
    if tuple(x.shape) != shape:
        raise InvalidInput(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    is_expected_kind = {
        "float": x.dtype.is_floating_point,
        "long": x.dtype == torch.long,
        "bool": x.dtype == torch.bool,
    }
    if not is_expected_kind[kind]:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {kind}")


def flatten(batch: TensorFields) -> dict[str, Tensor]:
    """Return every tensor of a batch by its name; those of its parts as "part.name"."""
    flat: dict[str, Tensor] = {}
    for name, value in batch._tensors().items():
        if isinstance(value, TensorFields):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat
