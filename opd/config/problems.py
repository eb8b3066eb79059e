"""Problems of a configuration that can be found without torch: values, ranges and combinations.

The rules that need the parts of a run, such as its objective, are in `opd.training.validation`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from diagnostics.errors import InvalidInput
from opd.config.field_checks import annotations, value_problem
from opd.config.fields import rules_of
from opd.config.prefixes import parse_prefixes
from opd.config.settings import (
    GROUPS,
    Config,
    TaskSettings,
    parse_template,
    setting_fields,
    with_settings,
)
from opd.serving.addresses import address_problem, is_url
from opd.tokens.mask_rules import parse_rules

PLACEHOLDERS = {"student": "student", "teacher": "teacher", "out": "out"}
"""Values of settings without a default in the place of invalid ones."""


def setting_problems(config: Config) -> list[str]:
    """List every invalid value, and every conflict between the valid ones.

    Args:
        config: The configuration; its values may have any type.

    Returns:
        One message per problem.
    """
    problems, config = separate_invalid(config)
    return [*problems, *conflicts(config, invalid_names(problems))]


def check_settings(config: Config) -> Config:
    """Return a configuration if `setting_problems` finds none, and raise InvalidInput otherwise."""
    raise_problems(setting_problems(config))
    return config


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one error with all problems; do nothing if there are none.

    Args:
        problems: Messages.

    Raises:
        InvalidInput: There are problems.
    """
    if len(problems) > 1:
        raise InvalidInput(f"{len(problems)} settings are invalid: {'. '.join(problems)}")
    if problems:
        raise InvalidInput(problems[0])


def separate_invalid(config: Config) -> tuple[list[str], Config]:
    """Find invalid values, and put valid ones in their place, so that other rules can be applied.

    An invalid address is left out of the result too: messages of other rules may quote it, and it
    may contain a password.

    Args:
        config: The configuration; its values may have any type.

    Returns:
        One message per invalid value, and a configuration without invalid values.
    """
    problems = []
    for group, kind in GROUPS.items():
        if not isinstance(getattr(config, group), kind):
            problems.append(
                f"{group} is a {type(getattr(config, group)).__name__}; it must be a "
                f"{kind.__name__}"
            )
            config = dataclasses.replace(config, **{group: kind()})
    tasks = config.tasks if isinstance(config.tasks, tuple) else ()
    for name, setting in setting_fields().items():
        holder = getattr(config, setting.group) if setting.group else config
        value = getattr(holder, name)
        problem = value_problem(
            name, value, annotations(setting.owner)[name], setting.rules.within
        ) or role_problem(value, setting.rules.address)
        if problem:
            problems.append(problem)
            replacement = PLACEHOLDERS.get(name, setting.field.default)
            config = with_settings(config, **{name: replacement})
    for task in tasks:
        if isinstance(task, TaskSettings):
            task_messages = list(task_problems(task))
            problems += [f"task {task.name!r}: {message}" for message in task_messages]
            if task_messages:
                config = with_settings(config, tasks=())
    return problems, config


def task_problems(task: TaskSettings) -> Iterator[str]:
    """Yield a message for every invalid value of a task."""
    fields = setting_fields()
    for field in dataclasses.fields(task):
        rules = fields[field.name].rules if field.name in fields else rules_of(field)
        value = getattr(task, field.name)
        problem = value_problem(
            field.name, value, annotations(TaskSettings)[field.name], rules.within
        )
        if problem or (problem := role_problem(value, rules.address)):
            yield problem
    if task.name == "":
        yield "name is ''; it must not be empty"


def role_problem(value: Any, role: str) -> str:
    """Return why a setting that may hold addresses of servers is invalid, or ""."""
    names = value if isinstance(value, tuple) else (value,)
    for name in names if role else ():
        if isinstance(name, str) and is_url(name) and (problem := address_problem(name, role)):
            return problem
    return ""


def invalid_names(problems: Sequence[str]) -> frozenset[str]:
    """Return the first word of each message, without an index: the setting that it is about."""
    return frozenset(problem.partition(" ")[0].partition("[")[0] for problem in problems)


def conflicts(config: Config, invalid: frozenset[str] = frozenset()) -> Iterator[str]:
    """Check combinations of settings that are each valid by themselves.

    Args:
        config: The configuration, of valid values.
        invalid: Settings that were invalid before; no message is about their replacements.

    Yields:
        A message for every conflict.
    """
    for name, value, ok, expected in combinations(config):
        if not ok and name not in invalid:
            yield f"{name} is {value!r}; it must be {expected}"
    if "out" not in invalid and not config.out.strip():
        yield f"out is {config.out!r}; it must not be empty"
    names = [task.name for task in config.tasks]
    if len(set(names)) < len(names):
        yield f"the names of the tasks are {names}; they must be different from each other"
    for text in (config.data.template, *(task.template or "{}" for task in config.tasks)):
        try:
            parse_template(text)
        except InvalidInput as error:
            yield str(error)
    try:
        parse_prefixes(config.rollout.prefixes)
    except InvalidInput as error:
        yield str(error)
    for mask in (config.objective.mask, *(task.mask or () for task in config.tasks)):
        try:
            parse_rules(mask)
        except InvalidInput as error:
            yield str(error)


def combinations(config: Config) -> Iterator[tuple[str, Any, bool, str]]:
    """Yield rules on combinations: setting, its value, whether it is allowed, what it must be."""
    data, rollout, hardware = config.data, config.rollout, config.hardware
    servers, addresses = rollout.engine == "servers", config.rollout_servers.rollout_servers
    yield (
        "rollout_servers",
        addresses,
        bool(addresses) == servers,
        "addresses if engine is servers, otherwise ()",
    )
    yield (
        "rollout_lag",
        rollout.rollout_lag,
        servers or not rollout.rollout_lag,
        "0 unless engine is servers, which sample from their own copy of the weights",
    )
    quantised = hardware.teacher_weights != "saved"
    yield (
        "teacher_weights",
        hardware.teacher_weights,
        not (hardware.offload_teacher and quantised),
        "saved if offload_teacher is set, which cannot move quantised weights",
    )
    yield (
        "teacher_weights",
        hardware.teacher_weights,
        not (config.teacher in ("base", "ema") and quantised),
        f"saved if the teacher is derived from the student ({config.teacher})",
    )
    yield (
        "probe_blocks",
        config.record.probe_blocks,
        bool(config.record.probe_every or not config.record.probe_blocks),
        "() if probe_every is 0",
    )
    yield (
        "updates_per_batch",
        config.optimizer.updates_per_batch,
        data.prompts_per_step % config.optimizer.updates_per_batch == 0,
        f"a divisor of prompts_per_step, {data.prompts_per_step}",
    )
    masked = bool(config.objective.mask or any(task.mask for task in config.tasks))
    yield (
        "mask_scope",
        config.objective.mask_scope,
        masked or config.objective.mask_scope == "cost",
        "'cost' without a mask, where 'loss' has no effect",
    )
