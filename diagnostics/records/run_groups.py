"""Run folders that are seeds of one method: grouping, names, and common steps. Needs no torch.

Runs are pooled, as seeds of one method, only if nothing else about them differs.
"""

import json
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.records.run_folder import RunFolder

NON_METHOD_SETTINGS = frozenset(
    (
        *(
            "seed",
            "out",
            "loggers",
            "full_metrics_every",
            "probe_every",
            "probe_blocks",
            "eval_every",
        ),
        *(
            "eval_problems",
            "save_every",
            "save_batch_every",
            "max_tokens_per_microbatch",
            "max_logits_per_chunk",
        ),
        *(
            "generation_batch_size",
            "gradient_checkpointing",
            "offload_teacher",
            "sharding",
            "device",
        ),
        *("teacher_timeout", "teacher_concurrency", "rollout_timeout", "rollout_concurrency"),
        *("rollout_servers", "weights_folder", "trust_remote_code"),
    )
)
"""Settings that may differ between seeds of a method: noise, paths, hardware, log intervals."""

EVALUATED_ON = "evaluated on"
"""Name of the difference between runs that were evaluated on different problems."""


def group_by_method(runs: list[Path]) -> dict[str, list[Path]]:
    """Group run folders by method.

    The method is METHOD of a folder METHOD-SEED, or else the whole name.

    Args:
        runs: Run folders.

    Returns:
        Folders by method.

    Raises:
        MissingFile: A folder is not a run folder.
        InvalidInput: Runs of one method differ in more than their seed, or have the same seed.
    """
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(RunFolder(run).method, []).append(run)
    for method, folders in groups.items():
        check_same_method(method, folders)
    return groups


def differing_settings(runs: list[Path]) -> dict[str, list[str]]:
    """Return the differences between runs that may be seeds of one method.

    Compared are the settings outside NON_METHOD_SETTINGS; the problems on which each task was
    evaluated; and "run", the folder name, if two runs have the same seed and so are no independent
    repetitions. Models and tasks are compared by content if all runs recorded it (identities.json,
    see `opd.runs.identity`), else by name.

    Args:
        runs: Run folders.

    Returns:
        Name to its text in each run, for the names that differ.
    """
    configs = [RunFolder(run).settings() for run in runs]
    texts_by_name: dict[str, list[str]] = {}
    for name in sorted({name for config in configs for name in config} - NON_METHOD_SETTINGS):
        texts_by_name[name] = [setting_text(config.get(name)) for config in configs]
    identities = [RunFolder(run).identities() for run in runs]
    for name in sorted(set.intersection(*map(set, identities)) if identities else ()):
        names = [setting_text(config.get(name)) for config in configs]
        values = [identity[name] for identity in identities]
        texts_by_name[name] = [
            f"{text} {value}" if len(set(values)) > 1 else value
            for text, value in zip(names, values, strict=True)
        ]
    for task in sorted({task for run in runs for task in evaluated_problems(run)}):
        texts_by_name[f"{EVALUATED_ON}{' ' + task if task else ''}"] = [
            evaluated_problems(run).get(task, "nothing") for run in runs
        ]
    seeds = [config.get("seed") for config in configs]
    if len(set(seeds)) < len(seeds):
        texts_by_name["run"] = [run.resolve().name for run in runs]
        if len(set(texts_by_name["run"])) < len(runs):
            texts_by_name["run"] = [str(run) for run in runs]
    return {name: texts for name, texts in texts_by_name.items() if len(set(texts)) > 1}


def folder_labels(folders: list[Path]) -> list[str]:
    """Return names of folders, with as many parent folders as needed to make them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    max_depth = max(map(len, parts))
    for depth in range(1, max_depth + 1):
        names = ["/".join(x[-depth:]) for x in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def evaluated_problems(run: Path) -> dict[str, str]:
    """Return task to the problems of its last evaluation: their number and fingerprint."""
    problems_by_task: dict[str, str] = {}
    for row in RunFolder(run).evaluations({}):
        count, problems = row.get("problems", ""), row.get("problem_set", "")
        problems_by_task[row.get("task", "")] = f"{count} problems {problems}".strip()
    return problems_by_task


def setting_text(value: Any) -> str:
    """Return a setting as part of a name: a string unchanged, else JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def distinct_names(runs: list[Path], names: list[str]) -> list[str]:
    """Return a name for each run, equal for two runs only if they are seeds of one method.

    Args:
        runs: Run folders.
        names: Preferred name of each; where runs of one name differ, the differences are appended.

    Returns:
        The names.
    """
    unique_names = list(names)
    for name in dict.fromkeys(names):
        positions = [i for i, other_name in enumerate(names) if other_name == name]
        differences = {
            k: x for k, x in differing_settings([runs[i] for i in positions]).items() if k != "run"
        }
        for k, i in enumerate(positions):
            if differences:
                unique_names[i] = (
                    f"{name} ({', '.join(f'{key} {x[k]}' for key, x in differences.items())})"
                )
    for name in dict.fromkeys(unique_names):
        positions = [i for i, other_name in enumerate(unique_names) if other_name == name]
        if run_labels := differing_settings([runs[i] for i in positions]).get("run"):
            for i, label in zip(positions, run_labels, strict=True):
                unique_names[i] = f"{name}, run {label}"
    return unique_names


def check_same_method(method: str, runs: list[Path], varying: frozenset[str] = frozenset()) -> None:
    """Raise unless the runs are seeds of one method.

    Args:
        method: Its name in messages.
        runs: Run folders.
        varying: Settings that differ between the seeds of the method by design.

    Raises:
        InvalidInput: They differ in more than their seed, or two have the same seed.
    """
    for name, texts in differing_settings(runs).items():
        if name in varying:
            continue
        i = next(i for i, text in enumerate(texts) if text != texts[0])
        reason = f"{name} is {texts[0]!r} in {runs[0]} and {texts[i]!r} in {runs[i]}"
        if name == "run":
            reason = f"two of {', '.join(map(str, runs))} have the same seed"
        raise InvalidInput(
            f"the runs of {method} are not seeds of one method: {reason}; rename a folder, or "
            "leave one out"
        )


def common_saved_steps(runs: list[Path]) -> list[int]:
    """Return the steps at which all of these runs saved a batch, ascending.

    Args:
        runs: Run folders.

    Returns:
        The steps.

    Raises:
        MissingFile: There is none.
    """
    common = sorted(set.intersection(*(set(RunFolder(run).batches()) for run in runs)))
    if not common:
        names = ", ".join(str(run) for run in runs)
        raise MissingFile(
            f"there is no step at which all of {names} saved a batch; see --save-batch-every"
        )
    return common
