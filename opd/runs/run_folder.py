"""The run folder: the only record of a run, written atomically, from which it resumes.

config.json, code.txt, starts.jsonl, rows.jsonl (one row per step), evals.jsonl, batches/,
checkpoints/, final/. Rows that a resumed run recomputes are kept in dropped/ (`opd.runs.restart`),
and the record of a run that was started over in earlier/.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.atomic import is_disk_full, sync, write_text
from diagnostics.records import rows
from diagnostics.records.renamed import present_settings
from opd.config.files import to_flat, to_groups
from opd.config.settings import Config, setting_fields, with_settings
from opd.runtime import distributed
from opd.runtime.manifest import find_damage
from opd.runtime.staged_folders import list_checkpoints, step_number

ARCHIVE_FOLDER = "earlier"
"""Subfolder to which --anew moves the records of earlier runs."""


@dataclass(frozen=True)
class Start:
    """Where a run starts or resumes."""

    step: int
    """First step to take."""
    checkpoint: str
    """Checkpoint to load; empty at step 0."""
    damaged: Mapping[str, str]
    """Paths of newer checkpoints that cannot be used, with the reason."""
    finished: bool = False
    """Whether all steps are done, the model is saved, and no checkpoint is left to resume from."""


@contextmanager
def open_run(config: Config, start_over: bool = False) -> Iterator[tuple[Path, Start]]:
    """Lock the run folder of `config` against other processes, and find where the run starts.

    Only rank 0 writes to the folder; the other ranks wait until it is ready.

    Args:
        config: Settings of the run.
        start_over: Start at step 0; the contents of the folder are moved to earlier/.

    Yields:
        The folder and the start.

    Raises:
        InvalidInput: The folder cannot be made, belongs to another program, or holds a run with
            other settings or one that cannot be resumed.
        OperationFailed: Another process is writing to the folder.
    """
    folder = Path(config.out)
    if distributed.rank() > 0:
        yield folder, Start(**distributed.all_gather_object({})[0])
        return
    make_folder(folder)
    try:
        lock = FileLock(folder / "run.lock", blocking=False).acquire()
    except Timeout as error:
        raise OperationFailed(f"another process is writing to {folder}") from error
    with lock:
        if start_over:
            archive_record(folder)
        refuse_other_settings(folder, config)
        start = find_start(folder, config)
        if not start.finished:
            recorded = with_settings(config, steps=max(config.steps, start.step))  # never fewer
            write_text(folder / "config.json", json.dumps(to_groups(recorded), indent=1))
        distributed.all_gather_object(asdict(start))
        yield folder, start


def make_folder(folder: Path) -> None:
    """Create a run folder, unless it exists.

    Args:
        folder: The folder.

    Raises:
        InvalidInput: Something else has its name, or it holds the config.json of another program,
            such as that of a model, which the settings of the run would replace.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidInput(
            f"out is {str(folder)!r}, but {error.filename} is no folder; choose another --out"
        ) from error
    path = folder / "config.json"
    if not path.exists() or has_record(folder):
        return
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError:
        settings = None
    if not (isinstance(settings, dict) and {"student", "teacher"} <= settings.keys()):
        raise InvalidInput(
            f"out is {str(folder)!r}, whose config.json is not that of a run, but perhaps of a "
            "model, and would be replaced; choose another --out"
        )


def has_record(folder: Path) -> bool:
    """Return whether a folder holds anything that a run has computed."""
    files = [folder / name for name in ("rows.jsonl", "evals.jsonl")]
    parts = [folder / name for name in ("batches", "checkpoints", "final", "ahead")]
    return any(path.exists() and path.stat().st_size for path in files) or any(
        path.is_dir() and any(path.iterdir()) for path in parts
    )


def refuse_other_settings(folder: Path, config: Config) -> None:
    """Refuse a folder with the record of a run with other settings.

    Args:
        folder: Run folder.
        config: Settings of the run.

    Raises:
        InvalidInput: Settings differ; the message names them.
    """
    path = folder / "config.json"
    if not has_record(folder):  # a run that failed before its first step, such as with a wrong task
        return
    remedy = (
        f"choose another --out, or add --anew, which moves the record to "
        f"{folder / ARCHIVE_FOLDER} and starts at step 0"
    )
    if not path.exists():
        raise InvalidInput(f"{folder} has a record but no config.json; {remedy}")
    try:
        old = present_settings(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise InvalidInput(f"could not read {path} ({error}); restore it, or {remedy}") from error
    new = to_flat(config)
    fields = setting_fields()
    for name in new.keys() - old.keys():  # a setting that is newer than the record
        default = fields[name].field.default
        old[name] = list(default) if isinstance(default, tuple) else default
    old["tasks"] = [without_none(task) for task in old.get("tasks", [])]
    new["tasks"] = [without_none(task) for task in new["tasks"]]
    differing = [
        name
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not (name in fields and fields[name].rules.resumable)
    ]
    if differing:
        differences = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in differing)
        raise InvalidInput(f"{folder} holds a run with other settings ({differences}); {remedy}")


def without_none(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a task without those that it leaves to the run."""
    return {name: value for name, value in task.items() if value is not None}


def find_start(folder: Path, config: Config) -> Start:
    """Find the newest intact checkpoint, or step 0 if the run cannot have had a checkpoint.

    Args:
        folder: Run folder.
        config: Settings of the run.

    Returns:
        Where the run starts.

    Raises:
        InvalidInput: All checkpoints are damaged, or the record shows that a checkpoint was lost.
    """
    damaged: dict[str, str] = {}
    for path in reversed(list_checkpoints(folder)):
        problem = find_damage(path)
        step = None if problem else saved_step(path)
        if step is not None:
            return Start(step, str(path), damaged)
        damaged[str(path)] = problem or f"{path / 'state.json'} has no step"
    if damaged:
        raise InvalidInput(
            f"{next(iter(damaged.values()))}; no intact checkpoint is left in "
            f"{folder / 'checkpoints'}. Restore a backup, or add --anew, which moves the record to "
            f"{folder / ARCHIVE_FOLDER} and starts at step 0"
        )
    steps = [row.get("step", -1) for row in rows.read_rows(folder / "rows.jsonl")]
    num_steps = max(steps, default=-1) + 1
    if num_steps >= config.steps and (folder / "final").exists():
        return Start(num_steps, "", {}, finished=True)
    if evidence := describe_lost_checkpoint(folder, num_steps):
        raise InvalidInput(
            f"{folder} {evidence} and no checkpoint to resume from. If "
            f"{folder / 'checkpoints'} was moved or deleted, restore it; or add --anew, which "
            "moves the record to "
            f"{folder / ARCHIVE_FOLDER} and starts at step 0; or choose another --out"
        )
    return Start(0, "", {})


def saved_step(folder: Path) -> int | None:
    """Return the number of completed steps in state.json of a checkpoint or of final/, or None."""
    path = folder / "state.json"
    state = json.loads(path.read_text("utf-8")) if path.exists() else {}
    step = state.get("step")
    return step if isinstance(step, int) else None


def describe_lost_checkpoint(folder: Path, num_steps: int) -> str:
    """Explain how a record of `num_steps` steps shows that there was a checkpoint, or return ""."""
    path = folder / "config.json"
    recorded = present_settings(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    save_interval = recorded.get("save_every", 0)
    if save_interval and num_steps > save_interval:
        return f"has a record of {num_steps} steps, saved every {save_interval},"
    if any(row.get("step", 0) for row in rows.read_rows(folder / "starts.jsonl")):
        return "was resumed from a checkpoint before"
    last = max(map(step_number, (folder / "batches").glob("step_*.safetensors")), default=0)
    if last > num_steps:  # a step's batch is saved before its row is
        return f"has a saved batch of step {last}, a record of {num_steps} steps"
    return ""


def archive_record(folder: Path) -> None:
    """Move the contents of a run folder, except its lock, to earlier/NUMBER."""
    names = [path for path in folder.iterdir() if path.name not in ("run.lock", ARCHIVE_FOLDER)]
    if not names:
        return
    numbers = [int(path.name) for path in (folder / ARCHIVE_FOLDER).glob("[0-9]*")]
    target = folder / ARCHIVE_FOLDER / f"{max(numbers, default=0) + 1:03d}"
    target.mkdir(parents=True)
    for path in names:
        os.replace(path, target / path.name)
    sync(target)
    sync(folder)


@contextmanager
def explain_errors(config: Config) -> Iterator[None]:
    """Turn out-of-memory and full-disk errors into messages with a remedy.

    Args:
        config: Settings of the run.

    Yields:
        Nothing.

    Raises:
        OperationFailed: The device is out of memory, or the disk is full.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OperationFailed(
            f"out of memory on {config.hardware.device}: lower max_tokens_per_microbatch "
            f"({config.hardware.max_tokens_per_microbatch}), max_logits_per_chunk "
            f"({config.hardware.max_logits_per_chunk}) or generation_batch_size "
            f"({config.rollout.generation_batch_size}), or set gradient_checkpointing or "
            "offload_teacher; "
            f"run the same command to resume ({error})"
        ) from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OperationFailed(
            f"could not write to {config.out}; the disk is probably full. Saved files are intact: "
            f"free some space and run the same command to resume ({error})"
        ) from error
