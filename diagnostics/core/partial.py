"""Batches of runs that did not record everything: what is absent raises `MissingField` when it is read.

So that a metric computes what the record allows, and `Monitor.missing` names the rest.
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
    """lost: names of fields that hold placeholders of zeros; reading one raises `MissingField`.

    who: how the message begins.
    """

    lost: frozenset[str] = frozenset()
    who: str = "the records have"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        object.__setattr__(self, "_sealed", True)

    def __getattribute__(self, name: str) -> Any:
        held = object.__getattribute__(self, "__dict__")
        if "_sealed" in held and name in held["lost"]:
            raise MissingField(f"{held['who']} no {name}")
        return object.__getattribute__(self, name)

    def _tensors(self) -> dict[str, Any]:
        values = _held(self)
        return {k: v for k, v in values.items() if isinstance(v, Tensor) or hasattr(v, "_tensors")}

    def _map(self, function: Any) -> Self:
        changed = {
            k: v._map(function) if hasattr(v, "_map") else function(v)
            for k, v in self._tensors().items()
        }
        return self._with(**changed)

    def _with(self, **values: Any) -> Self:
        return type(self)(**_held(self) | values)


@dataclass(frozen=True, kw_only=True, eq=False)
class PartialRollouts(_Partial, ScoredRollouts):
    """`ScoredRollouts` without some of its parts. Not for `save`: write records instead.

    generated_lengths: (B,) long, the sampled tokens of each response where nobody has the
    log-probabilities of some of them and `sampled_mask` leaves those out; None if it has them all.
    """

    generated_lengths: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        return super().lengths if self.generated_lengths is None else self.generated_lengths

    def save(self, path: Any) -> None:
        raise InvalidInput(
            f"a batch without {', '.join(sorted(self.lost))} cannot be saved as a batch file; "
            "write it with diagnostics.records.writer.write"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PartialSupport(_Partial, Support):
    """`Support` of which only one model's log-probabilities are known, or neither's."""


def lacking(part: Any, names: Iterable[str], who: str = "the records have") -> Any:
    """`part`, a `ScoredRollouts` or `Support`, in which reading one of `names` raises `MissingField`.

    The fields of these names must hold zeros of the right shape; what is derived from them raises
    too. With no names, `part` itself.

    Raises:
      ValueError: a name is not a field.
    """
    lost = frozenset(names) | absent(part)
    kind = PartialSupport if isinstance(part, Support) else PartialRollouts
    unknown = lost - {f.name for f in fields(kind)} | lost & {"lost", "who"}
    if unknown:
        raise InvalidInput(f"{sorted(unknown)} are no fields of {type(part).__name__}")
    return kind(**_held(part) | {"lost": lost, "who": who}) if lost else part


def changed(part: Any, **values: Any) -> Any:
    """`dataclasses.replace` for a part that may lack some of its fields."""
    return part._with(**values)


def absent(part: Any) -> frozenset[str]:
    """The names that this part lacks."""
    return vars(part).get("lost", frozenset())


def _held(part: Any) -> dict[str, Any]:
    return {f.name: vars(part)[f.name] for f in fields(part)}
