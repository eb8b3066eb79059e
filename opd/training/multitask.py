"""Runs with several tasks: settings per task, and which tasks a step trains on.

A task may have its own prompts, grader, teacher, lengths and mask. The settings of a task are those
of the run with the task's values in their place, so that a step of one task is a step of an
ordinary run. A file of tasks is TOML:

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
from dataclasses import fields
from functools import cache

from diagnostics.errors import InvalidInput
from opd.config.settings import Config, TaskSettings, with_settings
from opd.runtime.seeds import ORDER, derive_seed

TASK_FIELDS = tuple(f.name for f in fields(TaskSettings) if f.name not in ("name", "weight"))
"""Settings of the run that a task may override."""


def task_configs(config: Config) -> list[Config]:
    """Return one config per task, or the config itself for a run of a single task."""
    if not config.tasks:
        return [config]
    configs = []
    for task in config.tasks:
        overrides = {
            name: value for name in TASK_FIELDS if (value := getattr(task, name)) is not None
        }
        configs.append(with_settings(config, tasks=(), **overrides))
    return configs


def tasks_of_step(config: Config, step: int) -> list[tuple[int, int]]:
    """List the tasks that a step trains on.

    Args:
        config: Settings of the run.
        step: Step of the run.

    Returns:
        Pairs of (index of the task, number of steps that the task had before).
    """
    num_tasks = len(config.tasks)
    if num_tasks < 2:
        return [(0, step)]
    if config.data.task_order == "alternate":
        return [(step % num_tasks, step // num_tasks)]
    if config.data.task_order == "mixed":
        return [(task, step) for task in range(num_tasks)]
    weights = tuple(task.weight for task in config.tasks)
    task = sample_task(config.seed, step, weights)
    return [
        (
            task,
            sum(
                sample_task(config.seed, earlier_step, weights) == task
                for earlier_step in range(step)
            ),
        )
    ]


@cache
def sample_task(seed: int, step: int, weights: tuple[float, ...]) -> int:
    """Sample the task of a step by weight; depends on (seed, step) alone."""
    generator = random.Random(derive_seed(seed, step, ORDER))
    return generator.choices(range(len(weights)), weights)[0]


def prompts_per_task(config: Config) -> list[int]:
    """Split the prompts of a mixed step among the tasks by weight, at least one each.

    Args:
        config: Settings of the run.

    Returns:
        Number of prompts of each task.

    Raises:
        InvalidInput: There are fewer prompts per step than tasks, or a task's number of prompts is
            not a multiple of updates_per_batch.
    """
    total, weights = config.data.prompts_per_step, [task.weight for task in config.tasks]
    if total < len(weights):
        raise InvalidInput(
            f"prompts_per_step is {total}, but every step mixes {len(weights)} tasks; set "
            "prompts_per_step to at least the number of tasks"
        )
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(quota)) for quota in quotas]
    while sum(counts) < total:  # add to the task furthest below its quota
        counts[min(range(len(counts)), key=lambda i: counts[i] - quotas[i])] += 1
    while sum(counts) > total:  # remove from the task furthest above its quota
        reducible = [i for i, n in enumerate(counts) if n > 1]
        counts[max(reducible, key=lambda i: counts[i] - quotas[i])] -= 1
    if indivisible := [n for n in counts if n % config.optimizer.updates_per_batch]:
        raise InvalidInput(
            f"updates_per_batch is {config.optimizer.updates_per_batch}, but the tasks have "
            f"{counts} prompts "
            f"per step and {indivisible[0]} is not divisible by it; change the task weights, "
            "prompts_per_step or updates_per_batch"
        )
    return counts
