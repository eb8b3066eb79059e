"""Several tasks in one run: prompts, grader, teacher, lengths and mask of each, and their order.

A task's settings are those of the run with its own in their place, so that a step of one task is a
step of an ordinary run. A file of tasks is TOML:

    [[tasks]]
    name = "math"
    task = "problems.jsonl"
    teacher = "models/math-teacher"
    max_response = 1024

    [[tasks]]
    name = "games"
    ...
"""

import random
import tomllib
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

from diagnostics.errors import InvalidInput
from diagnostics.io.files import read_text
from opd.config.settings import Config, TaskSettings, task_settings
from opd.runtime.seeds import ORDER, derive

OWN = tuple(f.name for f in fields(TaskSettings) if f.name not in ("name", "weight"))


def read_tasks(path: Path) -> tuple[TaskSettings, ...]:
    """The tasks of a TOML file.

    Raises:
      ValueError: not TOML, no tasks, an unknown setting, or other tables beside them.
    """
    try:
        raw = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}") from error
    if set(raw) != {"tasks"} or not isinstance(raw["tasks"], list):
        raise InvalidInput(f"{path} must hold [[tasks]] and nothing else; it holds {sorted(raw)}")
    try:
        return tuple(task_settings(task) for task in raw["tasks"])
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def settings_of(config: Config) -> list[Config]:
    """The settings of each task of a run as those of a run of its own; of a run of one, itself."""
    if not config.tasks:
        return [config]
    found = []
    for task in config.tasks:
        own = {name: x for name in OWN if (x := getattr(task, name)) is not None}
        found.append(replace(config, tasks=(), **own))
    return found


def turns(config: Config, step: int) -> list[tuple[int, int]]:
    """The tasks of a step, each with the number of steps that it had before."""
    count = len(config.tasks)
    if count < 2:
        return [(0, step)]
    if config.task_order == "alternate":
        return [(step % count, step // count)]
    if config.task_order == "mixed":
        return [(task, step) for task in range(count)]
    weights = tuple(task.weight for task in config.tasks)
    task = drawn(config.seed, step, weights)
    return [(task, sum(drawn(config.seed, s, weights) == task for s in range(step)))]


@cache
def drawn(seed: int, step: int, weights: tuple[float, ...]) -> int:
    """The task of a step by weight; depends on (seed, step) alone."""
    generator = random.Random(derive(seed, step, ORDER))
    return generator.choices(range(len(weights)), weights)[0]


def shares(config: Config) -> list[int]:
    """Prompts of each task in a mixed step: by weight, at least one.

    Raises:
      ValueError: fewer prompts a step than tasks, or a share that `updates` does not divide.
    """
    total, weights = config.prompts_per_step, [task.weight for task in config.tasks]
    if total < len(weights):
        raise InvalidInput(
            f"prompts_per_step is {total}, and {len(weights)} tasks are mixed in every step; "
            "give each at least one prompt"
        )
    exact = [total * weight / sum(weights) for weight in weights]
    found = [max(1, int(x)) for x in exact]
    while sum(found) < total:  # give to the one with least of its due
        found[min(range(len(found)), key=lambda i: found[i] - exact[i])] += 1
    while sum(found) > total:  # take from the one with most beyond its due, if it can spare one
        able = [i for i, n in enumerate(found) if n > 1]
        found[max(able, key=lambda i: found[i] - exact[i])] -= 1
    if wrong := [n for n in found if n % config.updates_per_batch]:
        raise InvalidInput(
            f"updates_per_batch is {config.updates_per_batch} and the tasks have {found} prompts a step: {wrong[0]} "
            "cannot be shared by the updates; change weights, prompts_per_step or updates"
        )
    return found
