"""Python code that the settings of a record name, and which runs only if the user trusts it.

A run folder may come from somebody else. Its config.json therefore neither allows the code of a
model (trust_remote_code) nor chooses a function: both need the option --trust-remote-code.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from diagnostics.errors import InvalidInput
from diagnostics.io.user_functions import is_function_name
from opd.config.groups import DataConfig
from opd.config.settings import Config, TaskSettings, with_settings

GAMES = "env:"
"""Beginning of a task of games (`opd.envs.task`); the rest names an environment or a function."""


def named_functions(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the settings that name a function, MODULE:FUNCTION or FILE.py:FUNCTION.

    Args:
        config: The configuration; its values may have any type.

    Yields:
        Name of a setting and the function that it names, over all tasks.
    """
    sources: list[DataConfig | TaskSettings] = [config.data, *config.tasks]
    metrics = config.record.metrics if isinstance(config.record.metrics, tuple) else ()
    values: list[tuple[str, object]] = [
        ("objective", config.objective.objective),
        *(("metrics", name) for name in metrics),
        *(("grader", source.grader) for source in sources),
        *(
            ("task", source.task.removeprefix(GAMES))
            for source in sources
            if isinstance(source.task, str) and source.task.startswith(GAMES)
        ),
    ]
    for setting, value in values:
        if isinstance(value, str) and is_function_name(value):
            yield setting, value


def without_unreviewed_code(
    config: Config, path: str | Path, trust: bool, overridden: Collection[str] = ()
) -> Config:
    """Return the settings of a record, with the permission to run code that the user gives.

    Args:
        config: Settings that were read from `path`.
        path: A run's config.json, which may come from somebody else.
        trust: Whether the user passed --trust-remote-code.
        overridden: Settings that the user replaces, so that the record does not choose them.

    Returns:
        The settings with `trust` as trust_remote_code.

    Raises:
        InvalidInput: The record names a function whose code would run, and `trust` is False.
    """
    chosen = with_settings(config, tasks=()) if "tasks" in overridden else config
    for setting, function in named_functions(chosen):
        if not trust and setting not in overridden:
            raise InvalidInput(
                f"{path} names the {setting} {function}, a function whose code would run; review "
                "it, then pass --trust-remote-code to run it"
            )
    return with_settings(config, trust_remote_code=trust)
