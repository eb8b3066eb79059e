"""ALFWorld: its own engine and words, on households that are drawn by seed (`alfred`).

An optional extra, since the planner that its engine stands on is under the GPL.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from diagnostics.errors import InvalidInput, MissingPackage
from opd.envs.alfworld_games import game, goal_of, household
from opd.envs.base import Observation

IDLE: list[Any] = []
"""Engines that no game uses. Each has loaded a planner of its own, 2 MB that nothing can unload
without a crash when Python ends, so they are used again."""
WELCOME = "-= Welcome to TextWorld, ALFRED! =-"


class Alfworld:
    """One household in ALFWorld's words. planned: let the planner say what it would do next."""

    def __init__(self, planned: bool = False) -> None:
        from textworld import EnvInfos
        from textworld.envs import PddlEnv

        self.env = IDLE.pop() if IDLE else PddlEnv(EnvInfos(won=True, admissible_commands=True))
        self.env.request_infos.policy_commands = self.planned = planned
        self.state: Any = None

    def begin(self, seed: int) -> Observation:
        from alfworld.agents.utils.misc import Demangler

        home = household(seed)
        self.env.load(game(home))
        names = Demangler(game_infos=self.env._entity_infos, shuffle=False)
        for entity in self.env._entity_infos.values():
            entity.name = names.demangle_alfred_name(entity.id)
        self.state = self.env.reset()
        return self._scene(goal=f"{goal_of(home)}.")

    def act(self, action: str) -> Observation:
        self.state, _, _ = self.env.step(action)
        return self._scene()

    def expert(self) -> str:
        """The planner's next action.

        Raises:
          ValueError: `planned` is not set.
        """
        if not self.planned:
            raise InvalidInput("no plan is made; ask for Alfworld(planned=True)")
        return self.state["policy_commands"][0]

    def close(self) -> None:
        IDLE.append(self.env)

    def _scene(self, goal: str = "") -> Observation:
        won = bool(self.state["won"])
        return Observation(
            text=told(self.state.feedback),
            goal=goal,
            actions=tuple(self.state["admissible_commands"]),
            over=won,
            won=won,
        )


def told(feedback: str) -> str:
    """What the engine says, without its welcome and the task, which the goal tells."""
    parts = [part.strip() for part in feedback.replace(WELCOME, "").split("\n\n")]
    return " ".join(part for part in parts if part and not part.startswith("Your task is to:"))


def made() -> Callable[[], Alfworld]:
    """`Alfworld`, after a look whether it can be played.

    Raises:
      ImportError: alfworld, or its engine, is not installed; names the extra.
    """
    lacking = [name for name in ("alfworld", "textworld", "fast_downward") if not find_spec(name)]
    if lacking:
        raise MissingPackage(
            f"env:alfworld needs {', '.join(lacking)}: pip install 'opdlab[alfworld]' (its planner "
            "is under the GPL)"
        )
    return Alfworld
