"""Configurations in files: TOML and JSON, in groups or flat, under present or former names."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields, parse_json, read_text, short_repr
from diagnostics.records.renamed import SETTINGS, present_settings
from opd.config.problems import raise_problems, setting_problems, task_problems
from opd.config.settings import (
    GROUPS,
    Config,
    TaskSettings,
    closest_setting,
    setting_fields,
    setting_values,
    with_settings,
)

TASK_NAMES = tuple(field.name for field in dataclasses.fields(TaskSettings))
"""Settings that a [[tasks]] table may have."""


def to_flat(config: Config) -> dict[str, Any]:
    """Return the settings by name as plain JSON data, as loggers and model cards record them."""
    values = setting_values(config)
    values["tasks"] = [dataclasses.asdict(task) for task in config.tasks]
    data: dict[str, Any] = json.loads(json.dumps(values))
    return data


def to_groups(config: Config) -> dict[str, Any]:
    """Return the settings as plain data in groups, as files hold them, without those left out."""
    flat = to_flat(config)
    data: dict[str, Any] = {}
    for name, setting in setting_fields().items():
        holder = data.setdefault(setting.group, {}) if setting.group else data
        if flat[name] is not None and name != "tasks":
            holder[name] = flat[name]
    tasks = [
        {name: value for name, value in task.items() if value is not None} for task in flat["tasks"]
    ]
    return data | ({"tasks": tasks} if tasks else {})


def to_toml(config: Config) -> str:
    """Format a configuration as TOML, which `read_config` reads again."""
    top_level, tables = [], []
    for name, value in to_groups(config).items():
        if isinstance(value, dict):
            tables += ["", f"[{name}]", *(f"{key} = {toml_value(x)}" for key, x in value.items())]
        elif name == "tasks":
            for task in value:
                tables += ["", "[[tasks]]", *(f"{k} = {toml_value(x)}" for k, x in task.items())]
        else:
            top_level.append(f"{name} = {toml_value(value)}")
    return "\n".join([*top_level, *tables]) + "\n"


def toml_value(value: Any) -> str:
    """Format text, a boolean, a number or a list of these in TOML, where it is as in JSON."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_config(path: str | Path, *, check: bool = True) -> Config:
    """Read a configuration: a file that `opd train --show` printed, or a run's config.json.

    Args:
        path: A .json file, or TOML; settings in groups or flat, under present or former names.
        check: Whether to refuse what `opd.config.problems.setting_problems` reports.

    Returns:
        The configuration.

    Raises:
        InvalidInput: The file cannot be parsed, or has unknown settings or invalid values; the
            message names the file and the keys.
    """
    raw = read_table(path)
    try:
        config = config_from_data(raw, str(path))
        raise_problems(setting_problems(config) if check else [])
        return config
    except InvalidInput as error:
        message = str(error)
        raise InvalidInput(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from error


def read_table(path: str | Path) -> dict[str, Any]:
    """Read the object in a .json file, or the table in a TOML file.

    Args:
        path: The file.

    Returns:
        Plain data.

    Raises:
        InvalidInput: The file cannot be parsed, or holds something else.
    """
    text = read_text(path)
    if Path(path).suffix == ".json":
        raw = parse_json(text, str(path))
    else:
        try:
            raw = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InvalidInput(f"{path} is not valid TOML: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidInput(f"{path} holds {short_repr(raw)}, expected a JSON object")
    return raw


def read_tasks(path: Path) -> tuple[TaskSettings, ...]:
    """Read the tasks of a TOML file, [[tasks]] tables (`opd.training.multitask`).

    Args:
        path: The file.

    Returns:
        Settings of each task.

    Raises:
        InvalidInput: The file is not TOML, has no tasks, has other tables, or has an unknown or
            invalid setting; the message names the file.
    """
    raw = read_table(path)
    if set(raw) != {"tasks"} or not isinstance(raw["tasks"], list):
        raise InvalidInput(f"{path} must contain [[tasks]] tables only, but has {sorted(raw)}")
    try:
        tasks = tuple(task_from_data(task) for task in raw["tasks"])
        raise_problems(
            [f"task {task.name!r}: {text}" for task in tasks for text in task_problems(task)]
        )
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    return tasks


def config_from_data(raw: Mapping[str, Any], source: str) -> Config:
    """Build a configuration from plain data.

    Args:
        raw: Settings in groups or flat, under present or former names.
        source: File of the data, for messages.

    Returns:
        The configuration.

    Raises:
        InvalidInput: A setting is unknown or missing.
    """
    if problems := key_problems(raw):
        raise InvalidInput(f"{source}: {'. '.join(problems)}")
    settings = present_settings(raw)
    check_fields(settings, {"student": str, "teacher": str, "out": str}, source)
    tasks = settings.pop("tasks", [])
    if not isinstance(tasks, list):
        raise InvalidInput(f"tasks is {short_repr(tasks)}; it must be a list of objects")
    required = {name: settings.pop(name) for name in ("student", "teacher", "out")}
    config = with_settings(
        Config(**required), **{name: as_tuple(value) for name, value in settings.items()}
    )
    return with_settings(config, tasks=tuple(task_from_data(task) for task in tasks))


def key_problems(raw: Mapping[str, Any]) -> list[str]:
    """Return a message for every key that is no setting, is in another group, or occurs twice."""
    fields, problems = setting_fields(), []
    for key, value in raw.items():
        if key in GROUPS and isinstance(value, Mapping):
            for name in value:
                setting = fields.get(SETTINGS.get(name) or name)
                if setting is None:
                    problems.append(f"unknown setting {key}.{name}{closest_setting(name)}")
                elif setting.group != key:
                    problems.append(f"unknown setting {key}.{name}; it is called {setting.path}")
                elif name in raw and name not in GROUPS:
                    problems.append(f"{name} is given twice, as {name} and as {key}.{name}")
        elif isinstance(value, Mapping) and key not in fields:
            matches = get_close_matches(key, GROUPS, n=1)
            closest = f"; the closest is [{matches[0]}]" if matches else ""
            problems.append(f"unknown group of settings [{key}]{closest}")
        elif (SETTINGS.get(key) or key) not in fields:
            problems.append(f"unknown setting {key}{closest_setting(key)}")
    return problems


def task_from_data(raw: Any) -> TaskSettings:
    """Build the settings of one task from plain data; `setting_problems` checks the values.

    Args:
        raw: A mapping from TOML or JSON.

    Returns:
        The settings.

    Raises:
        InvalidInput: A field is unknown or missing.
    """
    if not isinstance(raw, Mapping):
        raise InvalidInput(
            f"a task is {short_repr(raw)}; it must be a table of settings, [[tasks]]"
        )
    unknown_names = sorted(set(raw) - set(TASK_NAMES))
    for name in unknown_names:
        if name in SETTINGS:
            raise InvalidInput(
                f"task {raw.get('name')!r}: {name} has been renamed to {SETTINGS[name]}"
            )
    if unknown_names:
        raise InvalidInput(
            f"task {raw.get('name')!r} has unknown settings {unknown_names}; known: "
            f"{sorted(TASK_NAMES)}"
        )
    if missing_names := sorted({"name", "task"} - raw.keys()):
        raise InvalidInput(f"task {raw.get('name')!r} lacks the settings {missing_names}")
    return TaskSettings(**{name: as_tuple(value) for name, value in raw.items()})


def as_tuple(value: Any) -> Any:
    """Convert a JSON or TOML list to a tuple; return any other value unchanged."""
    return tuple(value) if isinstance(value, list) else value
