"""Games as a task: where they come from, how they are told to a model, what an action is in text.

A source is `env:NAME`, of ENVIRONMENTS, or `env:MODULE:FUNCTION`, a function without arguments that
makes an `opd.envs.base.Environment`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.data.chat_template import render_chat
from opd.data.sources import Chat, Question
from opd.envs.base import Environment, Observation
from opd.envs.household import Household
from opd.runtime.seeds import derive

PREFIX = "env:"
LAYOUTS = ("turns", "trajectory")
SEEDS = 2**30
NOTHING = "Nothing happens."
SAID = "WHAT-WAS-SAID"
OPENING, CLOSING = "<action>", "</action>"


@dataclass(frozen=True, kw_only=True)
class GameTask:
    """Games by seed, and how they are told.

    layout: "turns", every turn is a prompt of its own (goal, recent history, scene, admissible
    actions) and a response to it; or "trajectory", one growing conversation. history: turns that a
    prompt of layout "turns" tells.
    """

    source: str
    make: Callable[[], Environment]
    seed: int = 0
    layout: str = "turns"
    max_turns: int = 30
    history: int = 2
    system: str = ""

    def train(self, step: int, count: int) -> list[int]:
        """Seeds of the games of a step; odd, so that none is held out."""
        return [derive(self.seed, step, i) % SEEDS * 2 + 1 for i in range(count)]

    def test(self, count: int) -> list[int]:
        """Seeds of held-out games, the same in every run."""
        return [2 * i for i in range(count)]

    def chat(self, text: str) -> Chat:
        system = (("system", self.system),) if self.system else ()
        return (*system, ("user", text))

    def question(self, text: str) -> Question:
        """The text as a problem without an answer, for `opd.data.tasks.encode`."""
        return Question(prompt=text, answer="", chat=self.chat(text) if self.system else ())

    def openings(self, seeds: list[int]) -> list[Problem]:
        """The first prompt of each game."""
        scenes = [self.make().begin(seed) for seed in seeds]
        return [self.question(told(scene.goal, (), scene, 0)) for scene in scenes]


def is_games(source: str) -> bool:
    return source.startswith(PREFIX)


def load_games(source: str, seed: int, **settings: Any) -> GameTask:
    """The games of a source; `settings` are fields of `GameTask`.

    Raises:
      ValueError: an unknown name, a module without that function, or a setting out of range.
      ImportError: the environment needs what is not installed.
    """
    name = source.removeprefix(PREFIX)
    games = GameTask(source=source, make=maker(name), seed=seed, **settings)
    if games.layout not in LAYOUTS:
        raise InvalidInput(f"layout is {games.layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if games.max_turns < 1 or games.history < 0:
        raise InvalidInput(
            f"max_turns is {games.max_turns} and history {games.history}; they must be at least 1 "
            "and 0"
        )
    return games


def maker(name: str) -> Callable[[], Environment]:
    """What makes an environment of that name."""
    module, colon, function = name.partition(":")
    if not colon:
        if name not in ENVIRONMENTS:
            known = ", ".join(PREFIX + x for x in ENVIRONMENTS)
            raise InvalidInput(
                f"unknown environment {name!r}; known: {known}, or env:MODULE:FUNCTION, a function "
                "that makes one"
            )
        return ENVIRONMENTS[name]()
    if str(Path.cwd()) not in sys.path:  # a module beside the run, as with `python -m`
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise InvalidInput(f"env:{name}: {error}") from error
    if not callable(found):
        raise InvalidInput(f"env:{name}: the module {module} has no function {function!r}")
    return found


def household() -> Callable[[], Environment]:
    return Household


def alfworld() -> Callable[[], Environment]:
    from opd.envs.alfworld import made

    return made()


ENVIRONMENTS: Mapping[str, Callable[[], Callable[[], Environment]]] = {
    "household": household,
    "alfworld": alfworld,
}


def told(goal: str, past: tuple[tuple[str, str], ...], scene: Observation, history: int) -> str:
    """A prompt: the goal, the last `history` scenes and actions, the scene, what may be done.

    past: (text of the scene, action) of every turn before.
    """
    lines = [f"Task: {goal}"] if goal else []
    recent = past[len(past) - history :] if history else ()
    for i, (text, action) in enumerate(recent, len(past) - len(recent) + 1):
        lines.append(f"{i}. {text}\n> {action}")
    return "\n".join([*lines, now(scene)])


def now(scene: Observation) -> str:
    """The scene and what may be done."""
    return "\n".join(
        [scene.text, *([f"Actions: {', '.join(scene.actions)}"] * bool(scene.actions))]
    )


def action_of(response: str, scene: Observation) -> tuple[str, bool]:
    """(the action that a response names, whether the scene admits it).

    The response is read behind its last closing think tag: the last <action>...</action>, or else
    the last line that is not blank. White space and capitals do not matter for admissible actions.
    """
    text = response.rsplit("</think>", 1)[-1]
    tagged = last_tagged(text)
    lines = [line for line in text.splitlines() if line.strip()] if tagged is None else [tagged]
    said = " ".join(lines[-1].split()) if lines else ""
    if not scene.actions:
        return said, bool(said)
    known = {" ".join(action.split()).casefold(): action for action in scene.actions}
    return known.get(said.casefold(), said), said.casefold() in known


def last_tagged(text: str) -> str | None:
    """What stands in the last <action>...</action>; None without one. Linear in the text."""
    start = text.rfind(OPENING, 0, max(0, text.rfind(CLOSING)))
    return None if start < 0 else text[start + len(OPENING) : text.find(CLOSING, start)]


def answered(
    environment: Environment, scene: Observation, action: str, admitted: bool
) -> Observation:
    """The scene after an action; one that is not admitted is not handed to the environment."""
    return environment.act(action) if admitted else Observation(text=NOTHING, actions=scene.actions)


def continued(tokenizer: Any, opening: Chat, text: str, last: int) -> list[int]:
    """Ids that follow a response in one conversation, up to where the next response begins.

    What the chat template puts between an assistant's words and its next turn, when the user says
    `text`; without its first id where the response ended with that one, `last`, itself. What was
    sampled is never encoded again, so the student goes on from its own tokens.

    Raises:
      ValueError: the template shows no assistant's words.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"\n{text}\n", add_special_tokens=False)
    chat = (*opening, ("assistant", SAID), ("user", text))
    shown = render_chat(tokenizer, chat)
    _, found, behind = shown.partition(SAID)
    if not found:
        raise InvalidInput(
            "the chat template does not show what the assistant said before; use layout turns"
        )
    ids = tokenizer.encode(behind, add_special_tokens=False)
    return ids[1:] if ids[:1] == [last] else ids
