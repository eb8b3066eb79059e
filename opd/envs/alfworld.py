"""ALFWorld: its engine and texts, on households that are generated from seeds.

An optional extra, because the planner that its engine uses is licensed under the GPL.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from diagnostics.errors import InvalidInput, MissingPackage
from opd.envs.alfworld_games import draw_household, game_definition, goal_text
from opd.envs.base import Observation

IDLE_ENGINES: list[Any] = []
"""Engines without a game, for reuse: each loads its own copy of the planner (2 MB), which cannot be
unloaded without a crash when Python exits."""
WELCOME = "-= Welcome to TextWorld, ALFRED! =-"


class Alfworld:
    """One household in ALFWorld's texts.

    Args:
        planned: Compute the planner's next action after every step, for `expert`.
    """

    def __init__(self, planned: bool = False) -> None:
        from textworld import EnvInfos
        from textworld.envs import PddlEnv

        self.env = (
            IDLE_ENGINES.pop()
            if IDLE_ENGINES
            else PddlEnv(EnvInfos(won=True, admissible_commands=True))
        )
        self.env.request_infos.policy_commands = self.planned = planned
        self.state: Any = None

    def begin(self, seed: int) -> Observation:
        """Start the game of this seed; return the first observation."""
        from alfworld.agents.utils.misc import Demangler

        home = draw_household(seed)
        self.env.load(game_definition(home))
        names = Demangler(game_infos=self.env._entity_infos, shuffle=False)
        for entity in self.env._entity_infos.values():
            entity.name = names.demangle_alfred_name(entity.id)
        self.state = self.env.reset()
        return self._observe(goal=f"{goal_text(home)}.")

    def act(self, action: str) -> Observation:
        """Take an action."""
        self.state, _, _ = self.env.step(action)
        return self._observe()

    def expert(self) -> str:
        """Return the planner's next action.

        Returns:
            The action.

        Raises:
            InvalidInput: `planned` is not set.
        """
        if not self.planned:
            raise InvalidInput("no plan was computed; create the environment with planned=True")
        return self.state["policy_commands"][0]

    def close(self) -> None:
        """Release the engine for reuse."""
        IDLE_ENGINES.append(self.env)

    def _observe(self, goal: str = "") -> Observation:
        won = bool(self.state["won"])
        return Observation(
            text=clean_feedback(self.state.feedback),
            goal=goal,
            actions=tuple(self.state["admissible_commands"]),
            over=won,
            won=won,
        )


def clean_feedback(feedback: str) -> str:
    """Remove the welcome text and the task, which is in the goal, from the engine's text."""
    parts = [part.strip() for part in feedback.replace(WELCOME, "").split("\n\n")]
    return " ".join(part for part in parts if part and not part.startswith("Your task is to:"))


def alfworld_class() -> Callable[[], Alfworld]:
    """Return `Alfworld` after checking that its packages are installed.

    Returns:
        The class.

    Raises:
        MissingPackage: Alfworld or its engine is not installed; names the extra.
    """
    missing_packages = [
        name for name in ("alfworld", "textworld", "fast_downward") if not find_spec(name)
    ]
    if missing_packages:
        raise MissingPackage(
            f"env:alfworld needs {', '.join(missing_packages)}: pip install 'opdlab[alfworld]' "
            "(its planner is licensed under the GPL)"
        )
    return Alfworld
