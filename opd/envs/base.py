"""What a text environment is: it begins a game, and answers each action with a scene."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Observation:
    """What is seen after an action.

    goal: what is to be done, told by the first scene; actions: those that may follow, empty where
    any text may; over: the game has ended, won or lost.
    """

    text: str
    goal: str = ""
    actions: tuple[str, ...] = ()
    over: bool = False
    won: bool = False


class Environment(Protocol):
    """One game at a time. Whatever it raises ends that game, and is counted as its failure."""

    def begin(self, seed: int) -> Observation:
        """The first scene of the game of this seed, the same one every time."""
        ...

    def act(self, action: str) -> Observation:
        """The scene after an action; an action that the game does not know changes nothing."""
        ...

    def close(self) -> None:
        """Free what the game holds; it is not played any more."""
        ...
