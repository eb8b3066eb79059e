"""Former names of settings, row keys and columns, so that older records stay readable."""

import re
from collections.abc import Mapping
from typing import Any

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

TASKS = {"env:rooms": "env:household"}
"""Former name of a task -> its present name."""

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


def present_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json under their present names, those of tasks included."""
    renamed = {SETTINGS.get(name, name): value for name, value in settings.items()}
    for name in ("task", "eval_task"):
        if isinstance(renamed.get(name), str):
            renamed[name] = TASKS.get(renamed[name], renamed[name])
    if isinstance(renamed.get("tasks"), list):
        renamed["tasks"] = [
            present_settings(task) if isinstance(task, Mapping) else task
            for task in renamed["tasks"]
        ]
    return renamed
