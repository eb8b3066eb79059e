"""Run folders by method, their saved batches, their rows by position; needs no torch.

Runs are pooled, as seeds of one method, only where nothing else about them differs.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import read_object
from diagnostics.records import rows
from diagnostics.records.renamed import present_settings
from diagnostics.records.rows import Row

BIN = re.compile(r"@(\d+)-(\d+)$")
NOT_OF_THE_METHOD = frozenset(
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
"""Settings in which seeds of one method may differ: noise, place, machine, how often one looks."""


class RecordedRow(dict[str, Any]):
    """A row of a record; a column that it lacks is the record's fault, and is named.

    run: the folder that it comes from.
    """

    def __init__(self, row: Row, run: Path) -> None:
        super().__init__(row)
        self.run = run

    def __missing__(self, name: str) -> Any:
        raise InvalidInput(
            f"{self.run}: the row of step {self.get('step')} has no {name!r}, which the figure is "
            "made of; leave the run out"
        )


def recorded_rows(run: Path) -> list[RecordedRow]:
    """The rows of a run, a step or a task of a step each."""
    return [RecordedRow(row, run) for row in rows.read(run / "rows.jsonl", {"step": int})]


def recorded_evaluations(run: Path) -> list[RecordedRow]:
    """The evaluations of a run, with their accuracies and outcomes."""
    needed = {"step": int, "accuracy": float, "outcomes": str}
    return [RecordedRow(row, run) for row in rows.read(run / "evals.jsonl", needed)]


def methods(runs: list[Path]) -> dict[str, list[Path]]:
    """Run folders by method: the name of a folder METHOD-SEED, or all of another name.

    Raises:
      FileNotFoundError: a folder is not a run folder.
      ValueError: runs of one method differ in more than their seed, or not even in that.
    """
    found: dict[str, list[Path]] = {}
    for run in runs:
        seed = settings(run)["seed"]
        found.setdefault(run.name.removesuffix(f"-{seed}"), []).append(run)
    for method, folders in found.items():
        refuse_unlike(method, folders)
    return found


def settings(run: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
      MissingFile: the folder is not a run folder. InvalidInput: no JSON, or a setting lacks.
    """
    if not (run / "config.json").exists():
        raise MissingFile(f"{run} is no run folder: it has no config.json")
    return present_settings(read_object(run / "config.json", {"seed": int}))


def differing(runs: list[Path]) -> dict[str, list[str]]:
    """What differs between runs of which each may be another seed: name to its text in each run.

    The settings but NOT_OF_THE_METHOD; the problems on which each task was judged; and "run", its
    name, where two runs have the same seed, so that they are no independent repetitions. Models
    and tasks are compared by what they hold where all the runs recorded it (identities.json, see
    `opd.runs.identity`), else by name.
    """
    configs = [settings(run) for run in runs]
    shown: dict[str, list[str]] = {}
    for name in sorted({name for config in configs for name in config} - NOT_OF_THE_METHOD):
        shown[name] = [short_text(config.get(name)) for config in configs]
    held = [identities(run) for run in runs]
    for name in sorted(set.intersection(*map(set, held)) if held else ()):
        names = [short_text(config.get(name)) for config in configs]
        values = [identity[name] for identity in held]
        shown[name] = [
            f"{text} {value}" if len(set(values)) > 1 else value
            for text, value in zip(names, values, strict=True)
        ]
    for task in sorted({task for run in runs for task in judged(run)}):
        shown[f"judged on{' ' + task if task else ''}"] = [
            judged(run).get(task, "nothing") for run in runs
        ]
    seeds = [config.get("seed") for config in configs]
    if len(set(seeds)) < len(seeds):
        shown["run"] = [run.resolve().name for run in runs]
        if len(set(shown["run"])) < len(runs):
            shown["run"] = [str(run) for run in runs]
    return {name: texts for name, texts in shown.items() if len(set(texts)) > 1}


def labels(folders: list[Path]) -> list[str]:
    """Names of run folders, with as many of the folders above them as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    deepest = max(map(len, parts))
    for depth in range(1, deepest + 1):
        names = ["/".join(x[-depth:]) for x in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def identities(run: Path) -> dict[str, str]:
    """What a run recorded of the contents of its models and tasks; empty for older runs."""
    path = run / "identities.json"
    return read_object(path) if path.exists() else {}


def judged(run: Path) -> dict[str, str]:
    """Task to the problems of its last evaluation: how many, and their fingerprint."""
    found: dict[str, str] = {}
    for row in rows.read(run / "evals.jsonl"):
        count, problems = row.get("problems", ""), row.get("problem_set", "")
        found[row.get("task", "")] = f"{count} problems {problems}".strip()
    return found


def short_text(value: Any) -> str:
    """A setting as part of a name: a string as it is, else JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def distinct_names(runs: list[Path], names: list[str]) -> list[str]:
    """A name for each run, equal for two runs only where they are seeds of one method.

    names: what each would be called; where runs of one name differ, what differs is added.
    """
    made = list(names)
    for name in dict.fromkeys(names):
        places = [i for i, one in enumerate(names) if one == name]
        away = {k: x for k, x in differing([runs[i] for i in places]).items() if k != "run"}
        for k, i in enumerate(places):
            if away:
                made[i] = f"{name} ({', '.join(f'{key} {x[k]}' for key, x in away.items())})"
    for name in dict.fromkeys(made):
        places = [i for i, one in enumerate(made) if one == name]
        if again := differing([runs[i] for i in places]).get("run"):
            for i, label in zip(places, again, strict=True):
                made[i] = f"{name}, run {label}"
    return made


def refuse_unlike(method: str, runs: list[Path]) -> None:
    """Refuse to pool runs that are no seeds of one method.

    Raises:
      ValueError: they differ in more than their seed, or two have the same one.
    """
    for name, texts in differing(runs).items():
        i = next(i for i, text in enumerate(texts) if text != texts[0])
        what = f"{name} is {texts[0]!r} in {runs[0]} and {texts[i]!r} in {runs[i]}"
        if name == "run":
            what = f"two of {', '.join(map(str, runs))} have the same seed"
        raise InvalidInput(
            f"the runs of {method} are not seeds of one method: {what}; give them folders of "
            "different names, or leave one out"
        )


def saved(runs: list[Path]) -> list[int]:
    """Steps at which every one of these runs saved a batch, rising.

    Raises:
      FileNotFoundError: there is none.
    """
    steps = [
        {int(p.stem.split("_")[1]) for p in (run / "batches").glob("step_*.safetensors")}
        for run in runs
    ]
    common = sorted(set.intersection(*steps))
    if not common:
        names = ", ".join(str(run) for run in runs)
        raise MissingFile(f"no step at which all of {names} saved a batch; see --save-batch-every")
    return common


def batch_path(run: Path, step: int) -> Path:
    return run / "batches" / f"step_{step:06d}.safetensors"


def bins(row: Row, name: str) -> dict[tuple[int, int], float]:
    """{(first, last position): value} of a metric in the position bins of a row; nulls are NaN."""
    found = {}
    for key, value in row.items():
        match = BIN.search(key)
        if match and key[: match.start()] == name:
            low, high = map(int, match.groups())
            found[low, high] = float("nan") if value is None else float(value)
    return dict(sorted(found.items()))


def pooled(values: list[float], errors: list[float], weights: list[float]) -> tuple[float, float]:
    """Weighted mean of independent values and its standard error, from theirs."""
    w = np.array(weights) / np.sum(weights)
    return float((w * values).sum()), float(np.sqrt((w**2 * np.square(errors)).sum()))


def short(x: float) -> float:
    """x to five significant digits, as tables keep it."""
    return float(f"{x:.5g}")
