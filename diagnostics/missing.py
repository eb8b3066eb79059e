"""Fields of a batch that some trainers and records do not have.

A metric then computes what the data allow, and `Monitor.missing` lists the rest.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class MissingField(LookupError):
    """The batch does not have a field that the metric needs."""


@dataclass(frozen=True)
class Missing:
    """What a field holds that the data do not have."""

    subject: str = "the batch has"
    """Beginning of the error message: "the records have" gives "the records have no reward"."""


class OptionalField(Generic[T]):
    """A dataclass field that holds a value or `Missing`; reading the latter raises `MissingField`.

    Args:
        default: Value of a field that the constructor is not given; none if left out.
    """

    def __init__(self, default: Any = MISSING) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, part: Any, owner: type | None = None) -> T:
        if part is None:  # `dataclass` reads the default from the class
            if self._default is MISSING:
                raise AttributeError(self._name)
            return self._default
        value = vars(part)[self._name]
        if isinstance(value, Missing):
            raise MissingField(f"{value.subject} no {self._name}")
        return value

    def __set__(self, part: Any, value: T) -> None:  # or Missing, which the type does not say
        vars(part)[self._name] = value


def optional_names(kind: type) -> set[str]:
    """Return the names of the fields of a class that may be missing."""
    attributes = [(name, x) for base in kind.__mro__ for name, x in vars(base).items()]
    return {name for name, x in attributes if isinstance(x, OptionalField)}


def missing_fields(part: Any) -> Mapping[str, str]:
    """Return the missing fields of a batch or of a part of it, each with its `Missing.subject`."""
    return {name: x.subject for name, x in vars(part).items() if isinstance(x, Missing)}
