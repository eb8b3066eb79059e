"""Batches with missing fields: reading a missing field raises `MissingField`.

A metric then computes what the recorded data allow, and `Monitor.missing` lists the rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput


@dataclass(frozen=True, kw_only=True, eq=False)
class _Partial:
    """Behaviour of a batch part in which some fields are placeholders."""

    missing_names: frozenset[str] = frozenset()
    """Names of fields that hold placeholder zeros; reading one raises `MissingField`."""
    subject: str = "the records have"
    """Beginning of the error message: "the records have" gives "the records have no reward"."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        object.__setattr__(self, "_sealed", True)

    def __getattribute__(self, name: str) -> Any:
        attributes = object.__getattribute__(self, "__dict__")
        if "_sealed" in attributes and name in attributes["missing_names"]:
            raise MissingField(f"{attributes['subject']} no {name}")
        return object.__getattribute__(self, name)

    def _tensors(self) -> dict[str, Any]:
        values = _field_values(self)
        return {k: v for k, v in values.items() if isinstance(v, Tensor) or hasattr(v, "_tensors")}

    def _map(self, function: Any) -> Self:
        mapped = {
            k: v._map(function) if hasattr(v, "_map") else function(v)
            for k, v in self._tensors().items()
        }
        return self._with(**mapped)

    def _with(self, **values: Any) -> Self:
        return type(self)(**_field_values(self) | values)


@dataclass(frozen=True, kw_only=True, eq=False)
class PartialRollouts(_Partial, ScoredRollouts):
    """`ScoredRollouts` with missing fields. Cannot be saved with `save`: write records instead."""

    generated_lengths: Tensor | None = None
    """(B,) long, sampled tokens of each response, for batches where some of them have no
    log-probabilities and `sampled_mask` therefore excludes them; None if all have them.
    """

    @property
    def lengths(self) -> Tensor:
        """(B,) number of sampled tokens in each response."""
        return super().lengths if self.generated_lengths is None else self.generated_lengths

    def save(self, path: Any) -> None:
        """Raise `InvalidInput`: a batch file has no notion of missing fields."""
        raise InvalidInput(
            f"a batch without {', '.join(sorted(self.missing_names))} cannot be saved as a batch "
            "file; write it with diagnostics.records.writer.save_records"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PartialSupport(_Partial, Support):
    """`Support` in which the log-probabilities of one model, or of both, are missing."""


def without_fields(part: Any, names: Iterable[str], subject: str = "the records have") -> Any:
    """Return the part with some fields marked as missing; reading one then raises `MissingField`.

    The fields must hold zeros of the right shape. Properties derived from them raise too.

    Args:
        part: A `ScoredRollouts` or `Support`.
        names: Fields to mark as missing; with no names `part` itself is returned.
        subject: Beginning of the error message, such as "the records have".

    Returns:
        A `PartialRollouts` or `PartialSupport` with the same values.

    Raises:
        InvalidInput: A name is not a field.
    """
    missing_names = frozenset(names) | missing_fields(part)
    kind = PartialSupport if isinstance(part, Support) else PartialRollouts
    unknown = missing_names - {f.name for f in fields(kind)} | missing_names & {
        "missing_names",
        "subject",
    }
    if unknown:
        raise InvalidInput(f"{type(part).__name__} has no fields {sorted(unknown)}")
    return (
        kind(**_field_values(part) | {"missing_names": missing_names, "subject": subject})
        if missing_names
        else part
    )


def replace_fields(part: Any, **values: Any) -> Any:
    """Return a copy with other field values, as `dataclasses.replace`, also with missing fields."""
    return part._with(**values)


def missing_fields(part: Any) -> frozenset[str]:
    """Return the names of the missing fields of a part."""
    return vars(part).get("missing_names", frozenset())


def _field_values(part: Any) -> dict[str, Any]:
    return {f.name: vars(part)[f.name] for f in fields(part)}
