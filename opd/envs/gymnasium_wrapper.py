"""Environments with the Gymnasium interface as text games; gymnasium itself is not required.

`reset(seed=...) -> (observation, info)`, `step(action) -> (observation, reward, terminated,
truncated, info)`. The observation is text, or is converted by a function.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diagnostics.errors import InvalidInput
from opd.envs.base import Observation

ADMISSIBLE = ("admissible_commands", "admissible_actions", "available_actions", "valid_actions")
"""Keys of `info` under which environments list the admissible actions."""
WON = ("won", "success", "is_success")
"""Keys of `info` under which environments report success."""

TextFunction = Callable[[Any, Mapping[str, Any]], str]
"""(observation, info) -> text."""


def as_text(observation: Any, info: Mapping[str, Any]) -> str:
    """Return an observation that is text already.

    Args:
        observation: The environment's observation.
        info: Unused.

    Returns:
        The observation.

    Raises:
        TypeError: The observation is not text.
    """
    if not isinstance(observation, str):
        raise TypeError(
            f"the observation has type {type(observation).__name__}, expected str; pass "
            "Gymnasium(..., text=...), a function of (observation, info) that returns text"
        )
    return observation


class Gymnasium:
    """An `Environment` around an environment with the Gymnasium interface.

    A game is won if `info` reports success (WON) or, if it has none of these keys, if the game
    terminated with a positive reward.

    Args:
        env: The Gymnasium environment.
        text: Converts (observation, info) to text.
        goal: The task; if empty, `info["goal"]` of the reset, if there is one.
        names: Names of the actions 0, 1, ... of an environment with discrete actions. Without
            names the action text is passed on, and `info` may list the admissible actions
            (ADMISSIBLE).
    """

    def __init__(
        self, env: Any, *, text: TextFunction = as_text, goal: str = "", names: Sequence[str] = ()
    ) -> None:
        self.env, self.text, self.goal, self.names = env, text, goal, tuple(names)

    def begin(self, seed: int) -> Observation:
        """Reset the environment with this seed."""
        observation, info = self.env.reset(seed=seed)
        return self._convert(observation, info, goal=self.goal or str(info.get("goal", "")))

    def act(self, action: str) -> Observation:
        """Take an action.

        Args:
            action: Its name or text.

        Returns:
            The observation.

        Raises:
            InvalidInput: The action has none of `names`.
        """
        if self.names and action not in self.names:
            raise InvalidInput(f"unknown action {action!r}; known: {', '.join(self.names)}")
        env_action = self.names.index(action) if self.names else action
        observation, reward, terminated, truncated, info = self.env.step(env_action)
        success_flags = [bool(info[name]) for name in WON if name in info]
        won = any(success_flags) if success_flags else bool(terminated and reward > 0)
        return self._convert(observation, info, over=bool(terminated or truncated), won=won)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _convert(self, observation: Any, info: Mapping[str, Any], **fields: Any) -> Observation:
        action_lists = [info[name] for name in ADMISSIBLE if name in info]
        actions = self.names or tuple(map(str, action_lists[0] if action_lists else ()))
        return Observation(text=self.text(observation, info), actions=actions, **fields)
