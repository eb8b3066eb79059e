"""Games as a task: sources of environments, prompt formats, and parsing of actions.

A source is `env:NAME` with a name of ENVIRONMENTS, or `env:MODULE:FUNCTION` or
`env:FILE.py:FUNCTION` with a function without arguments that returns an
`opd.envs.base.Environment`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.user_functions import check_arguments, is_function_name, load_function
from diagnostics.records.renamed import TASKS
from opd.data.chain_task import Problem
from opd.data.chat_template import render_chat
from opd.data.messages import Chat
from opd.data.sources import DatasetProblem, Template
from opd.envs.base import Environment, Observation
from opd.envs.household import Household
from opd.runtime.seeds import derive_seed

PREFIX = "env:"
LAYOUTS = ("turns", "trajectory")
NUM_SEEDS = 2**30
INVALID_ACTION_TEXT = "Nothing happens."
PLACEHOLDER = "WHAT-WAS-SAID"
"""Stands for an assistant message when the text after it is taken from the chat template."""
OPENING, CLOSING = "<action>", "</action>"


@dataclass(frozen=True, kw_only=True)
class GameTask:
    """Games by seed, and the format of their prompts."""

    source: str
    make: Callable[[], Environment]
    """Creates an environment."""
    seed: int = 0
    layout: str = "turns"
    """"turns": every turn is a prompt of its own (goal, recent history, observation, admissible
    actions) with a response; "trajectory": the episode is one growing conversation."""
    max_turns: int = 30
    """Maximum number of actions of an episode."""
    history: int = 2
    """Number of previous turns in a prompt of layout "turns"."""
    system: str = ""
    """System message."""
    template: Template = ()
    """Names and values passed to the chat template."""

    def train(self, step: int, count: int) -> list[int]:
        """Return the game seeds of a training step; they are odd, so none is held out."""
        return [derive_seed(self.seed, step, i) % NUM_SEEDS * 2 + 1 for i in range(count)]

    def test(self, count: int) -> list[int]:
        """Return the seeds of held-out games, the same in every run."""
        return [2 * i for i in range(count)]

    def chat(self, text: str) -> Chat:
        """Return a conversation of the system message, if any, and a user message."""
        system = (("system", self.system),) if self.system else ()
        return (*system, ("user", text))

    def problem(self, text: str) -> DatasetProblem:
        """Return a prompt as a problem without an answer."""
        return DatasetProblem(
            prompt=text,
            answer="",
            chat=self.chat(text) if self.system else (),
            template=self.template,
        )

    def openings(self, seeds: list[int]) -> list[Problem]:
        """Return the first prompt of each game."""
        observations = [self.make().begin(seed) for seed in seeds]
        return [
            self.problem(format_prompt(observation.goal, (), observation, 0))
            for observation in observations
        ]


def is_games(source: str) -> bool:
    """Return whether a task source names games."""
    return source.startswith(PREFIX)


def load_games(source: str, seed: int, **settings: Any) -> GameTask:
    """Build the task of a game source.

    Args:
        source: "env:NAME", "env:MODULE:FUNCTION" or "env:FILE.py:FUNCTION".
        seed: Seed of the training games.
        **settings: Further fields of `GameTask`.

    Returns:
        The task.

    Raises:
        InvalidInput: An unknown name, a module without that function, or a setting out of range.
        ImportError: The environment needs a package that is not installed.
    """
    name = source.removeprefix(PREFIX)
    games = GameTask(source=source, make=environment_factory(name), seed=seed, **settings)
    if games.layout not in LAYOUTS:
        raise InvalidInput(f"layout is {games.layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if games.max_turns < 1 or games.history < 0:
        raise InvalidInput(
            f"max_turns is {games.max_turns} and history_turns is {games.history}; they must be at "
            "least 1 and 0"
        )
    return games


def environment_factory(name: str) -> Callable[[], Environment]:
    """Return the function that creates an environment.

    Args:
        name: A name of ENVIRONMENTS, or a function, MODULE:FUNCTION or FILE.py:FUNCTION.

    Returns:
        A function without arguments.

    Raises:
        InvalidInput: An unknown name, or a function that cannot be imported or returns something
            else than an environment.
    """
    if not is_function_name(name):
        if name not in ENVIRONMENTS:
            if present := TASKS.get(PREFIX + name):
                raise InvalidInput(f"{PREFIX}{name} is now called {present}")
            known_names = ", ".join(PREFIX + x for x in ENVIRONMENTS)
            raise InvalidInput(
                f"unknown environment {name!r}; known: {known_names}, or env:MODULE:FUNCTION or "
                "env:FILE.py:FUNCTION with a function that returns an environment"
            )
        return ENVIRONMENTS[name]()
    factory = load_function(name, "environment")
    check_arguments(factory, name, "environment")
    try:
        environment = factory()
    except Exception as error:  # a user's function can raise anything
        raise InvalidInput(
            f"the environment {name} failed with {type(error).__name__}: {error}; it must return "
            "an environment without needing arguments"
        ) from error
    check_environment(environment, name)
    return factory


def check_environment(environment: object, name: str) -> None:
    """Refuse an object without the methods of an environment.

    Args:
        environment: What the function returned; the game of seed 0 is begun, and closed.
        name: Name of the function, for messages.

    Raises:
        InvalidInput: A method is missing or takes other arguments, or `begin` returns another type.
    """
    if not isinstance(environment, Environment):
        raise InvalidInput(
            f"the environment {name} returned a {type(environment).__name__}, which lacks one of "
            "the methods begin, act and close (opd.envs.base.Environment); wrap an environment "
            "with reset and step in opd.envs.gymnasium_wrapper.Gymnasium"
        )
    check_arguments(environment.begin, f"{name}, method begin,", "environment", "seed")
    check_arguments(environment.act, f"{name}, method act,", "environment", "action")
    check_arguments(environment.close, f"{name}, method close,", "environment")
    try:
        observation = environment.begin(0)
    except Exception as error:
        raise InvalidInput(
            f"the environment {name} failed with {type(error).__name__}: {error} at begin(0); it "
            "must begin a game for any seed"
        ) from error
    environment.close()
    if not isinstance(observation, Observation):
        raise InvalidInput(
            f"the environment {name}: begin(0) returned a {type(observation).__name__}; it must "
            "return an opd.envs.base.Observation"
        )


def household_factory() -> Callable[[], Environment]:
    """Return the class of the household game."""
    return Household


def alfworld_factory() -> Callable[[], Environment]:
    """Return the class of ALFWorld games; raises ImportError without the extra alfworld."""
    from opd.envs.alfworld import alfworld_class

    return alfworld_class()


ENVIRONMENTS: Mapping[str, Callable[[], Callable[[], Environment]]] = {
    "household": household_factory,
    "alfworld": alfworld_factory,
}


def format_prompt(
    goal: str, past_turns: tuple[tuple[str, str], ...], observation: Observation, history: int
) -> str:
    """Format a prompt: goal, recent turns, current observation, admissible actions.

    Args:
        goal: The task of the game; may be empty.
        past_turns: (observation text, action) of every previous turn.
        observation: The current observation.
        history: Number of previous turns in the prompt.

    Returns:
        The prompt.
    """
    lines = [f"Task: {goal}"] if goal else []
    recent_turns = past_turns[len(past_turns) - history :] if history else ()
    for i, (text, action) in enumerate(recent_turns, len(past_turns) - len(recent_turns) + 1):
        lines.append(f"{i}. {text}\n> {action}")
    return "\n".join([*lines, format_observation(observation)])


def format_observation(observation: Observation) -> str:
    """Format an observation and its admissible actions."""
    return "\n".join(
        [
            observation.text,
            *([f"Actions: {', '.join(observation.actions)}"] * bool(observation.actions)),
        ]
    )


def parse_action(response: str, observation: Observation) -> tuple[str, bool]:
    """Parse the action from a response.

    The action is the last <action>...</action> after the last closing think tag, or else the last
    non-blank line. White space and case are ignored for admissible actions.

    Args:
        response: Text of the response.
        observation: The current observation, with the admissible actions.

    Returns:
        The action, and whether it is admissible.
    """
    text = response.rsplit("</think>", 1)[-1]
    tagged = last_action_tag(text)
    lines = [line for line in text.splitlines() if line.strip()] if tagged is None else [tagged]
    action_text = " ".join(lines[-1].split()) if lines else ""
    if not observation.actions:
        return action_text, bool(action_text)
    known_actions = {" ".join(action.split()).casefold(): action for action in observation.actions}
    return (
        known_actions.get(action_text.casefold(), action_text),
        action_text.casefold() in known_actions,
    )


def last_action_tag(text: str) -> str | None:
    """Return the content of the last <action>...</action>, or None; in linear time."""
    start = text.rfind(OPENING, 0, max(0, text.rfind(CLOSING)))
    return None if start < 0 else text[start + len(OPENING) : text.find(CLOSING, start)]


def step_environment(
    environment: Environment, observation: Observation, action: str, admissible: bool
) -> Observation:
    """Take an action; an inadmissible one does not reach the environment.

    Args:
        environment: The game.
        observation: The current observation.
        action: The action.
        admissible: Whether the observation admits it.

    Returns:
        The next observation; INVALID_ACTION_TEXT with the same actions for an inadmissible action.
    """
    return (
        environment.act(action)
        if admissible
        else Observation(text=INVALID_ACTION_TEXT, actions=observation.actions)
    )


def continuation_ids(
    tokenizer: Any, opening: Chat, text: str, last_id: int, template: Template = ()
) -> list[int]:
    """Return the ids between two responses of one conversation.

    They are what the chat template renders between an assistant message and the start of the next
    one, with a user message in between. Sampled responses are never encoded again, so the student
    continues from its own tokens.

    Args:
        tokenizer: The student's tokenizer.
        opening: The conversation up to the first response.
        text: The user message.
        last_id: Last id of the response; the first id of the result is left out if it equals it.
        template: Names and values passed to the chat template.

    Returns:
        The ids.

    Raises:
        InvalidInput: The template does not render the assistant message.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"\n{text}\n", add_special_tokens=False)
    chat = (*opening, ("assistant", PLACEHOLDER), ("user", text))
    rendered = render_chat(tokenizer, chat, **dict(template))
    _, placeholder, suffix = rendered.partition(PLACEHOLDER)
    if not placeholder:
        raise InvalidInput(
            "the chat template does not render previous assistant messages; use layout turns"
        )
    ids = tokenizer.encode(suffix, add_special_tokens=False)
    return ids[1:] if ids[:1] == [last_id] else ids
