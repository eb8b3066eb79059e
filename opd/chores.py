"""What a player of the household says, turn by turn: what the lab's models of `env:rooms` learn.

The prompts are those of a run's layout "turns". The player knows no more than its prompt: it looks
into places that it did not just come from until it sees what it wants, and brings it.
"""

import random
import re

from opd.environments.rooms import Rooms
from opd.games import told
from opd.problems import Problem

MAX_TURNS, HISTORY, ASTRAY = 20, 2, 0.3


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` turns of games that the player plays, straying now and then, with its actions.

    "train" and "test" have no seed of a game in common.

    Raises:
      ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}; it must be "train" or "test"')
    generator = random.Random(f"chores-{split}-{seed}")
    found: list[Problem] = []
    while len(found) < count:
        game = 2 * generator.randrange(2**30) + (split == "train")
        prompt = generator.choice(turns(game, generator))
        action = careless(prompt, 0.0, generator)
        found.append(Problem(prompt, action, action))
    return found


def turns(game: int, generator: random.Random) -> list[str]:
    """The prompts of one game, played with errors."""
    rooms, past, prompts = Rooms(), list[tuple[str, str]](), list[str]()
    scene = rooms.begin(game)
    goal = scene.goal
    while not scene.over and len(prompts) < MAX_TURNS:
        prompts.append(told(goal, tuple(past), scene, HISTORY))
        past.append((scene.text, careless(prompts[-1], ASTRAY, generator)))
        scene = rooms.act(past[-1][1])
    return prompts


def careless(prompt: str, rate: float, generator: random.Random) -> str:
    """The player's action, or any admissible one with probability `rate`."""
    actions = prompt.rsplit("Actions: ", 1)[1].split(", ")
    return generator.choice(actions if generator.random() < rate else sensible(prompt, actions))


def sensible(prompt: str, actions: list[str]) -> list[str]:
    """The actions among which the player does not mind, in a scene that is told by the prompt."""
    goal = prompt.splitlines()[0]
    target = goal.rsplit(" in the ", 1)[1].rstrip(".")
    wanted = re.findall(r"the (\w+)", goal.rsplit(" in the ", 1)[0])
    done = re.findall(r"^> (.*)$", prompt, re.M)
    held = re.findall(r"put (\w+) in", ", ".join(actions)) or held_by(done)
    here = [action for action in actions if not action.startswith("go")]
    if held and held[0] in wanted:
        there = [a for a in here if a in (f"put {held[0]} in {target}", f"open {target}")]
        return there or [f"go to {target}"]
    takes = [f"take {thing} from" for thing in wanted]
    useful = [a for a in here if any(a.startswith(x) for x in takes) and not a.endswith(target)]
    useful = useful or [a for a in here if a.startswith(("open", "put")) and a != f"open {target}"]
    fresh = [a for a in actions if a.startswith("go") and a not in done and not a.endswith(target)]
    return useful or fresh or [a for a in actions if a.startswith("go")]


def held_by(done: list[str]) -> list[str]:
    """What was taken and not put down, as far as the actions tell."""
    changes = [action.split()[:2] for action in done if action.startswith(("take", "put"))]
    return [changes[-1][1]] if changes and changes[-1][0] == "take" else []
