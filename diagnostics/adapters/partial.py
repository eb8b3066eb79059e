"""Batches of runs that did not record everything: what is absent raises `Missing` when it is read.

So that a metric computes what the record allows, and `Monitor.missing` names the rest.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Self

from torch import Tensor

from diagnostics.access import Missing
from diagnostics.batch import Scored, Support


class _Absent:
    """Reading a name of `_absent` raises `Missing`; its tensor is a placeholder of zeros."""

    def __getattribute__(self, name: str) -> Any:
        held = object.__getattribute__(self, "__dict__")
        if name in held.get("_absent", ()):
            raise Missing(f"{held['_who']} no {name}")
        return object.__getattribute__(self, name)

    def _tensors(self) -> dict[str, Any]:
        held = vars(self)
        values = {f.name: held[f.name] for f in fields(self)}  # type: ignore[arg-type]
        return {k: v for k, v in values.items() if isinstance(v, Tensor) or hasattr(v, "_tensors")}

    def _map(self, function: Any) -> Self:
        changed = {
            k: v._map(function) if hasattr(v, "_map") else function(v)
            for k, v in self._tensors().items()
        }
        plain = {f.name: vars(self)[f.name] for f in fields(self)}  # type: ignore[arg-type]
        return _mark(type(self)(**plain | changed), vars(self)["_absent"], vars(self)["_who"])


class PartialScored(_Absent, Scored):
    """`Scored` without some of its parts. Not for `save`: write records instead."""

    def save(self, path: Any) -> None:
        raise ValueError(
            f"a batch without {', '.join(absent(self))} cannot be saved as a batch file; write it "
            "with diagnostics.adapters.writing.write"
        )


class PartialSupport(_Absent, Support):
    """`Support` of which only one model's log-probabilities are known, or neither's."""


_PARTIAL: dict[type, Callable[..., Any]] = {Scored: PartialScored, Support: PartialSupport}


def lacking(part: Any, names: Iterable[str], who: str = "the records have") -> Any:
    """`part`, a `Scored` or `Support`, in which reading one of `names` raises `Missing`.

    The fields of these names must hold zeros of the right shape; what is derived from them raises
    too. With no names, `part` itself.

    Raises:
      ValueError: a name is not a field.
    """
    names = frozenset(names) | absent(part)
    known = {f.name for f in fields(part)}
    if not names <= known:
        raise ValueError(f"{sorted(names - known)} are no fields of {type(part).__name__}")
    if not names:
        return part
    kind = next(kind for base, kind in _PARTIAL.items() if isinstance(part, base))
    return _mark(kind(**{name: vars(part)[name] for name in known}), names, who)


def absent(part: Any) -> frozenset[str]:
    """The names that this part lacks."""
    return vars(part).get("_absent", frozenset())


def _mark(part: Any, names: frozenset[str], who: str) -> Any:
    object.__setattr__(part, "_who", who)
    object.__setattr__(part, "_absent", names)
    return part
