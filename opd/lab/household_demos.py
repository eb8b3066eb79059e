"""What a player of the household says, turn by turn: what the lab's models of `env:household` learn.

The prompts are those of a run's layout "turns". The player knows no more than its prompt. It says
what it holds, goes through the actions in order, and takes the first that it approves of:

    <think>hold nothing, take pen from desk no, go to bed yes</think>go to bed

It looks into places that it did not just come from until it sees what it wants, and brings it.
"""

import random
import re

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.envs.household import Household
from opd.envs.task import action_of, answered, told

MAX_TURNS, HISTORY, MAX_RESPONSE = 16, 2, 64
ASTRAY, MISTAKEN = 0.2, 0.15
"""Of the games that prompts come from: how often the player misjudges an action, and how often it
takes one that it heard of in another place."""


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` turns of games that the player plays, with errors now and then, and what it says.

    "train" and "test" have no seed of a game in common.

    Raises:
      ValueError: another split.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f'split is {split!r}; it must be "train" or "test"')
    generator = random.Random(f"chores-{split}-{seed}")
    found: list[Problem] = []
    while len(found) < count:
        game = 2 * generator.randrange(2**30) + (split == "train")
        prompt = generator.choice(turns(game, generator))
        said = careless(prompt, 0.0, generator)
        found.append(Problem(prompt, said.split("</think>")[1], said))
    return found


def turns(game: int, generator: random.Random) -> list[str]:
    """The prompts of one game, played carelessly, and with actions that are not admissible."""
    rooms, past, prompts, heard = Household(), list[tuple[str, str]](), list[str](), set[str]()
    scene = rooms.begin(game)
    goal = scene.goal
    while not scene.over and len(prompts) < MAX_TURNS:
        prompts.append(told(goal, tuple(past), scene, HISTORY))
        heard |= set(scene.actions)
        action, _ = action_of(careless(prompts[-1], ASTRAY, generator), scene)
        if generator.random() < MISTAKEN:
            action = generator.choice(sorted(heard))
        past.append((scene.text, action))
        scene = answered(rooms, scene, action, action in scene.actions)
    return prompts


def careless(prompt: str, rate: float, generator: random.Random) -> str:
    """What the player says who judges each action wrongly with probability `rate`.

    Who approves of none takes the last one that it looked at.
    """
    actions = prompt.rsplit("Actions: ", 1)[1].split(", ")
    done = re.findall(r"^> (.*)$", prompt, re.M)
    held = held_by(actions, done)
    right = approved(actions, done, held, generator)
    thought = [f"hold {held or 'nothing'}"]
    for action in actions:
        yes = (action == right) != (generator.random() < rate)
        thought.append(f"{action} {'yes' if yes else 'no'}")
        if yes:
            break
    return f"<think>{', '.join(thought)}</think>{action}"


def approved(actions: list[str], done: list[str], held: str, generator: random.Random) -> str:
    """The action that the player takes; one at random of places that it has no reason to prefer.

    What the goal names is in capitals.
    """
    there = [a for a in actions if a.split()[-1].isupper() and not a.startswith("take")]
    if held.isupper() and there:
        return there[0]
    away = [a for a in actions if not a.split()[-1].isupper()]
    useful = [a for a in away if a.startswith(("open", "put")) or a.split()[1].isupper()]
    if useful:
        return useful[0]
    places = [a for a in away if a.startswith("go")]
    return generator.choice([a for a in places if a not in done] or places or actions)


def held_by(actions: list[str], done: list[str]) -> str:
    """What can be put down here; where that does not show, what was taken and not put down."""
    if actions[0].startswith("put"):
        return actions[0].split()[1]
    changes = [a.split()[:2] for a in done if a.startswith(("take", "put"))]
    shut = actions[0].startswith("open")
    return changes[-1][1] if shut and changes and changes[-1][0] == "take" else ""
