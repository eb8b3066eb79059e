"""The interface of text environments."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Observation:
    """What the player sees after an action."""

    text: str
    goal: str = ""
    """The task; given by the first observation of a game only."""
    actions: tuple[str, ...] = ()
    """Admissible actions; empty if any text is admissible."""
    over: bool = False
    """Whether the game has ended, won or lost."""
    won: bool = False


@runtime_checkable
class Environment(Protocol):
    """A text game, one episode at a time.

    An exception in any method ends the episode, which is counted as failed.
    """

    def begin(self, seed: int) -> Observation:
        """Start the game of this seed; return the first observation, always the same per seed."""
        ...

    def act(self, action: str) -> Observation:
        """Take an action; an unknown action must not change the state."""
        ...

    def close(self) -> None:
        """Free the resources of the game."""
        ...
