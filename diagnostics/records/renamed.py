"""Former names of settings, row keys and columns, so that older records stay readable."""

import re
from collections.abc import Mapping
from typing import Any

from diagnostics.errors import InvalidInput

SETTINGS = {
    "advantage": "reward_baseline",
    "ahead": "rollout_lag",
    "batch_every": "save_batch_every",
    "checkpointing": "gradient_checkpointing",
    "chunk_elements": "max_logits_per_chunk",
    "clip": "max_grad_norm",
    "collapse_accepted": "allow_collapse",
    "drop_long": "skip_long_prompts",
    "exact_every": "full_metrics_every",
    "history": "history_turns",
    "keep_uncertain": "entropy_top_fraction",
    "micro_tokens": "max_tokens_per_microbatch",
    "outcome": "reward_weight",
    "own_end": "map_eos",
    "rollout_patience": "rollout_timeout",
    "rollout_requests": "rollout_concurrency",
    "rows_at_once": "generation_batch_size",
    "teacher_patience": "teacher_timeout",
    "teacher_requests": "teacher_concurrency",
    "unweighted_accepted": "allow_unweighted",
    "updates": "updates_per_batch",
}
"""Former name of a setting of `opd train` -> its present name."""

SETTING_GROUPS = (
    "data",
    "rollout",
    "objective",
    "optimizer",
    "evaluation",
    "record",
    "hardware",
    "view",
    "remote_teacher",
    "rollout_servers",
    "games",
)
"""Groups in which a config.json holds settings; in former ones the settings were not grouped."""

EVALUATION_SETTINGS = {
    "drop": "skip_long_prompts",
    "problems": "eval_problems",
    "samples": "eval_samples",
    "temperature": "eval_temperature",
    "top_p": "eval_top_p",
}
"""Former name of an option of `opd eval` -> its present name."""

TASKS = {"env:rooms": "env:household"}
"""Former name of a task -> its present name."""

LAB_KINDS = {"rooms": "household", "strangers": "mismatched"}
"""Former name of a kind of toy models, such as of the option and folder -> its present name."""

PREFIXES = {"drift": "divergence", "supervision": "signal", "validity": "consistency"}
"""Former first part of a row key -> its present one."""

KEYS = {
    **{
        f"collapse/{name}": f"response/{name}"
        for name in ("length", "lengths", "truncated_share", "reward", "graded_share")
    },
    **{
        f"collapse/{name}": f"diversity/{name}"
        for name in ("distinct_4", "pass_1", "pass_2", "second_try", "early_entropy")
    },
    **{
        f"collapse/{name}": f"repetition/{name}"
        for name in ("repeated_share", "compressible_share")
    },
}
"""Former beginning of a row key -> its present one, where the first part alone is ambiguous."""

_FORMER = re.compile(
    rf"(?P<group>^|.*/)(?:(?P<prefix>{'|'.join(PREFIXES)})(?=/)"
    rf"|(?P<key>{'|'.join(sorted(KEYS, key=len, reverse=True))}))"
)


def present_key(key: str) -> str:
    """Return the present name of a row key; a key that was never renamed is unchanged.

    Keys of a group keep the group: "task=math/drift/k1" is "task=math/divergence/k1".

    Args:
        key: Present or former name.

    Returns:
        The present name.
    """
    match = _FORMER.match(key)
    if match is None:
        return key
    name = PREFIXES[match["prefix"]] if match["prefix"] else KEYS[match["key"]]
    return f"{match['group']}{name}{key[match.end() :]}"


def present_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row under the present names of its keys."""
    return {present_key(key): value for key, value in row.items()}


def present_lab_settings(settings: Any) -> Any:
    """Return the settings of a lab.json with the present names of the tasks of each model."""
    if isinstance(settings, list):
        return [present_lab_settings(value) for value in settings]
    if not isinstance(settings, Mapping):
        return settings
    present = {name: present_lab_settings(value) for name, value in settings.items()}
    if isinstance(present.get("tasks"), list):
        present["tasks"] = [LAB_KINDS.get(task, task) for task in present["tasks"]]
    return present


def present_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json by their present names, those of tasks included.

    Args:
        settings: Content of a config.json, in groups or flat, under present or former names.

    Returns:
        The settings without groups.
    """
    flat = dict(settings)
    for group in SETTING_GROUPS:
        if isinstance(flat.get(group), Mapping):
            flat |= flat.pop(group)
    renamed = {SETTINGS.get(name, name): value for name, value in flat.items()}
    for name in ("task", "eval_task"):
        if isinstance(renamed.get(name), str):
            renamed[name] = TASKS.get(renamed[name], renamed[name])
    if isinstance(renamed.get("tasks"), list):
        renamed["tasks"] = [
            present_settings(task) if isinstance(task, Mapping) else task
            for task in renamed["tasks"]
        ]
    return renamed


def present_evaluation_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded options of `opd eval` by their present names.

    Args:
        settings: Options under present or former names.

    Returns:
        The options; a former `whole` is an `eval_task`.
    """
    present = {EVALUATION_SETTINGS.get(name, name): value for name, value in settings.items()}
    if present.pop("whole", False):
        present["eval_task"] = present.pop("task", "")
    return present_settings(present)


def refuse_renamed_options(
    arguments: list[str], present_names: Mapping[str, str], help_command: str
) -> None:
    """Refuse command-line options with a former name.

    Args:
        arguments: The command-line arguments.
        present_names: Former name of a setting -> its present name.
        help_command: Command that lists the options.

    Raises:
        InvalidInput: An option has a former name; the message contains the present one.
    """
    for word in arguments:
        option = word.partition("=")[0]
        former = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        if option.startswith("--") and former in present_names:
            present = present_names[former].replace("_", "-")
            raise InvalidInput(f"{option} is now called --{present}; see `{help_command} --help`")
