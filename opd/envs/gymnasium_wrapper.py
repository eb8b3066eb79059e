"""Environments with Gymnasium's interface, played in text; gymnasium itself is not needed.

`reset(seed=...) -> (observation, info)`, `step(action) -> (observation, reward, terminated,
truncated, info)`. The observation is text, or `text` makes it so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diagnostics.errors import InvalidInput
from opd.envs.base import Observation

ADMISSIBLE = ("admissible_commands", "admissible_actions", "available_actions", "valid_actions")
WON = ("won", "success", "is_success")

TeacherScores = Callable[[Any, Mapping[str, Any]], str]


def as_text(observation: Any, info: Mapping[str, Any]) -> str:
    """The observation, which is text.

    Raises:
      TypeError: it is something else; says what to do.
    """
    if not isinstance(observation, str):
        raise TypeError(
            f"the observation is a {type(observation).__name__}, not text; give Gymnasium(..., "
            "text=...), a function of (observation, info) that describes it"
        )
    return observation


class Gymnasium:
    """An environment with Gymnasium's interface as ours.

    text: a scene's text from (observation, info). goal: what is to be done; where it is empty,
      `info["goal"]` of the reset, if there is one.
    names: the actions' names, for an environment whose actions are numbers: the nth is n. Without
      them the text itself is handed over, and `info` may list the admissible ones (ADMISSIBLE).

    A game is won when `info` says so (WON) or, where it does not say, when it ended by itself with
    a positive reward.
    """

    def __init__(
        self, env: Any, *, text: TeacherScores = as_text, goal: str = "", names: Sequence[str] = ()
    ) -> None:
        self.env, self.text, self.goal, self.names = env, text, goal, tuple(names)

    def begin(self, seed: int) -> Observation:
        observation, info = self.env.reset(seed=seed)
        return self._scene(observation, info, goal=self.goal or str(info.get("goal", "")))

    def act(self, action: str) -> Observation:
        if self.names and action not in self.names:
            raise InvalidInput(f"{action!r} is no action; they are {', '.join(self.names)}")
        given = self.names.index(action) if self.names else action
        observation, reward, terminated, truncated, info = self.env.step(given)
        told = [bool(info[name]) for name in WON if name in info]
        won = any(told) if told else bool(terminated and reward > 0)
        return self._scene(observation, info, over=bool(terminated or truncated), won=won)

    def close(self) -> None:
        self.env.close()

    def _scene(self, observation: Any, info: Mapping[str, Any], **more: Any) -> Observation:
        listed = [info[name] for name in ADMISSIBLE if name in info]
        actions = self.names or tuple(map(str, listed[0] if listed else ()))
        return Observation(text=self.text(observation, info), actions=actions, **more)
