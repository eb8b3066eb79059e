"""Losses of the bank with what an audit must say of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Loss = Callable[..., Any]


@dataclass(frozen=True)
class Right:
    """A loss without a fault."""

    function: Loss
    target: tuple[str, ...]
    """Texts in the name of its target; none if it has no target and that is no fault."""
    warnings: tuple[str, ...]
    caveats: tuple[str, ...]

    @property
    def verdict(self) -> str:
        return "warn" if self.warnings else "ok"


@dataclass(frozen=True)
class Faulty:
    """A loss with a fault."""

    function: Loss
    code: str


RIGHT: list[Right] = []
FAULTY: list[Faulty] = []


def right(
    *target: str, warnings: tuple[str, ...] = (), caveats: tuple[str, ...] = ()
) -> Callable[[Loss], Loss]:
    """Put a loss into the bank that has this target."""

    def register(function: Loss) -> Loss:
        RIGHT.append(Right(function, target, warnings, caveats))
        return function

    return register


def faulty(code: str) -> Callable[[Loss], Loss]:
    """Put a loss into the bank that has this fault."""

    def register(function: Loss) -> Loss:
        FAULTY.append(Faulty(function, code))
        return function

    return register
