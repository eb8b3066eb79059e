"""Demonstrations of a household game, turn by turn.

The toy models for `env:household` are trained on them. The prompts are those of a run with layout
"turns". The player knows no more than its prompt. It states what it holds, judges the actions in
order, and takes the first one that it approves:

    <think>hold nothing, take pen from desk no, go to bed yes</think>go to bed

It visits places that it did not just come from until it sees the target object, and delivers it.
"""

import random
import re

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem
from opd.envs.household import Household
from opd.envs.task import format_prompt, parse_action, step_environment

MAX_TURNS, HISTORY, MAX_RESPONSE = 16, 2, 64
MISJUDGE_RATE, INADMISSIBLE_RATE = 0.2, 0.15
"""In the games that prompts come from: probability that the player misjudges an action, and
probability of an action that was admissible earlier in the game."""


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """Return `count` turns of games with occasional errors, each with the correct response.

    "train" and "test" use disjoint game seeds.

    Args:
        split: "train" or "test".
        count: Number of turns.
        seed: Seed of the sample.

    Returns:
        The turns as problems.

    Raises:
        InvalidInput: An unknown split.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f'split is {split!r}; it must be "train" or "test"')
    generator = random.Random(f"chores-{split}-{seed}")
    demonstrations: list[Problem] = []
    while len(demonstrations) < count:
        game = 2 * generator.randrange(2**30) + (split == "train")
        prompt = generator.choice(game_prompts(game, generator))
        response = corrupted_solution(prompt, 0.0, generator)
        demonstrations.append(Problem(prompt, response.split("</think>")[1], response))
    return demonstrations


def game_prompts(game: int, generator: random.Random) -> list[str]:
    """Play one game with errors and inadmissible actions; return its prompts."""
    household, history, prompts, known_actions = (
        Household(),
        list[tuple[str, str]](),
        list[str](),
        set[str](),
    )
    observation = household.begin(game)
    goal = observation.goal
    while not observation.over and len(prompts) < MAX_TURNS:
        prompts.append(format_prompt(goal, tuple(history), observation, HISTORY))
        known_actions |= set(observation.actions)
        action, _ = parse_action(
            corrupted_solution(prompts[-1], MISJUDGE_RATE, generator), observation
        )
        if generator.random() < INADMISSIBLE_RATE:
            action = generator.choice(sorted(known_actions))
        history.append((observation.text, action))
        observation = step_environment(
            household, observation, action, action in observation.actions
        )
    return prompts


def corrupted_solution(prompt: str, rate: float, generator: random.Random) -> str:
    """Return the response of a player that misjudges each action with probability `rate`.

    A player that approves no action takes the last one.

    Args:
        prompt: The prompt of the turn.
        rate: Error rate per action.
        generator: Source of randomness.

    Returns:
        The response.
    """
    actions = prompt.rsplit("Actions: ", 1)[1].split(", ")
    past_actions = re.findall(r"^> (.*)$", prompt, re.M)
    object_held = held_object(actions, past_actions)
    approved_action = best_action(actions, past_actions, object_held, generator)
    reasoning = [f"hold {object_held or 'nothing'}"]
    for action in actions:
        is_approved = (action == approved_action) != (generator.random() < rate)
        reasoning.append(f"{action} {'yes' if is_approved else 'no'}")
        if is_approved:
            break
    return f"<think>{', '.join(reasoning)}</think>{action}"


def best_action(
    actions: list[str], past_actions: list[str], object_held: str, generator: random.Random
) -> str:
    """Return the action that the player takes; a random one of equally good places.

    What the goal names is in capitals.

    Args:
        actions: The admissible actions.
        past_actions: The actions in the prompt.
        object_held: What the player holds, or "".
        generator: Source of randomness.

    Returns:
        The action.
    """
    goal_actions = [a for a in actions if a.split()[-1].isupper() and not a.startswith("take")]
    if object_held.isupper() and goal_actions:
        return goal_actions[0]
    other_actions = [a for a in actions if not a.split()[-1].isupper()]
    useful = [a for a in other_actions if a.startswith(("open", "put")) or a.split()[1].isupper()]
    if useful:
        return useful[0]
    places = [a for a in other_actions if a.startswith("go")]
    return generator.choice([a for a in places if a not in past_actions] or places or actions)


def held_object(actions: list[str], past_actions: list[str]) -> str:
    """Return what can be put down here, or else what was taken and not put down."""
    if actions[0].startswith("put"):
        return actions[0].split()[1]
    object_actions = [a.split()[:2] for a in past_actions if a.startswith(("take", "put"))]
    is_closed = actions[0].startswith("open")
    return (
        object_actions[-1][1]
        if is_closed and object_actions and object_actions[-1][0] == "take"
        else ""
    )
