"""The run folder: the only record of a run, never half-written, and where a run goes on from it.

config.json, code.txt, starts.jsonl, rows.jsonl (one row a step), evals.jsonl, batches/,
checkpoints/, final/; what a resumed run writes again is kept in dropped/ (`opd.runs.restart`), and the
record of a run that was started anew in earlier/.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.atomic import is_disk_full, sync, write_text
from diagnostics.records import rows
from diagnostics.records.renamed import present_settings
from opd.config.settings import Config, to_json
from opd.runtime import distributed
from opd.runtime.manifest import damage
from opd.runtime.staged_folders import checkpoints, step_of

FREE_TO_CHANGE = (
    *("steps", "out", "eval_every", "save_every", "save_batch_every", "probe_every", "loggers"),
    *(
        "max_tokens_per_microbatch",
        "max_logits_per_chunk",
        "generation_batch_size",
        "gradient_checkpointing",
        "offload_teacher",
    ),
    *("teacher_timeout", "teacher_concurrency", "rollout_timeout", "rollout_concurrency"),
    *("rollout_servers", "weights_folder", "sharding", "trust_remote_code"),
    *("start_checks", "rescore_every"),
)
"""Settings that say how far, how often, where or what is allowed, and not what is computed."""
EARLIER = "earlier"
"""Folder in a run folder, to which `anew` moves the records of runs before."""


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.

    step: the first one to take. checkpoint: to load, empty at the beginning. damaged: newer
    checkpoints that cannot be used, by their path, with the reason. finished: all steps are taken
    and the model is saved, and no checkpoint is left to go on from.
    """

    step: int
    checkpoint: str
    damaged: Mapping[str, str]
    finished: bool = False


@contextmanager
def open_run(config: Config, anew: bool = False) -> Iterator[tuple[Path, Start]]:
    """The run folder of `config`, locked against a second process while in use, and its start.

    Only the first of a run's processes writes in it; the others wait for it to be ready.

    Args:
      anew: begin at step 0; what the folder holds is moved to earlier/.

    Raises:
      InvalidInput: the folder holds a run with other settings, or one that cannot go on.
      OperationFailed: another process is writing to the folder.
    """
    folder = Path(config.out)
    if distributed.rank() > 0:
        yield folder, Start(**distributed.told({})[0])
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OperationFailed(f"another process is writing to {folder}") from error
        if anew:
            set_aside(folder)
        refuse_other_settings(folder, config)
        start = find_start(folder, config)
        if not start.finished:
            write_text(folder / "config.json", json.dumps(to_json(config), indent=1))
        distributed.told(asdict(start))
        yield folder, start


def recorded(folder: Path) -> bool:
    """Whether a folder holds anything that a run has computed."""
    files = [folder / name for name in ("rows.jsonl", "evals.jsonl")]
    parts = [folder / name for name in ("batches", "checkpoints", "final", "ahead")]
    return any(path.exists() and path.stat().st_size for path in files) or any(
        path.is_dir() and any(path.iterdir()) for path in parts
    )


def refuse_other_settings(folder: Path, config: Config) -> None:
    """Refuse a folder with a record of other settings.

    Raises:
      InvalidInput: names the settings that differ.
    """
    path = folder / "config.json"
    if not recorded(folder):  # a run that never began, such as one whose task was not found
        return
    remedy = (
        f"choose another --out, or add --anew, which moves the record to {folder / EARLIER} and "
        "begins at step 0"
    )
    if not path.exists():
        raise InvalidInput(f"{folder} has a record but no config.json; {remedy}")
    try:
        old = present_settings(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise InvalidInput(f"{path} cannot be read ({error}); restore it, or {remedy}") from error
    new = to_json(config)
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    changed = [k for k in changed if k not in FREE_TO_CHANGE]
    if changed:
        what = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
        raise InvalidInput(f"{folder} holds a run with other settings ({what}); {remedy}")


def find_start(folder: Path, config: Config) -> Start:
    """The newest whole checkpoint, or the beginning if there cannot have been a checkpoint.

    Raises:
      InvalidInput: all checkpoints are damaged, or the record goes beyond where one was made.
    """
    damaged: dict[str, str] = {}
    for path in reversed(checkpoints(folder)):
        problem = damage(path)
        step = None if problem else saved_step(path)
        if step is not None:
            return Start(step, str(path), damaged)
        damaged[str(path)] = problem or f"{path / 'state.json'} names no step"
    if damaged:
        raise InvalidInput(
            f"{next(iter(damaged.values()))}; no whole checkpoint is left in "
            f"{folder / 'checkpoints'}. Put a copy of it back, or add --anew, which moves the "
            f"record to {folder / EARLIER} and begins at step 0"
        )
    steps = [row.get("step", -1) for row in rows.read(folder / "rows.jsonl")]
    done = max(steps, default=-1) + 1
    if done >= config.steps and (folder / "final").exists():
        return Start(done, "", {}, finished=True)
    if lost := had_checkpoint(folder, done):
        raise InvalidInput(
            f"{folder} {lost} and no checkpoint to go on from: was {folder / 'checkpoints'} moved "
            f"or deleted? Put it back; or add --anew, which moves the record to {folder / EARLIER} "
            "and begins at step 0; or choose another --out"
        )
    return Start(0, "", {})


def saved_step(checkpoint: Path) -> int | None:
    """The number of steps done at a whole checkpoint, if its state.json tells one."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text("utf-8")) if path.exists() else {}
    step = state.get("step")
    return step if isinstance(step, int) else None


def had_checkpoint(folder: Path, done: int) -> str:
    """How a record of `done` steps shows that there was a checkpoint, or ""."""
    path = folder / "config.json"
    every = json.loads(path.read_text("utf-8")).get("save_every", 0) if path.exists() else 0
    if every and done > every:
        return f"has a record of {done} steps, saved every {every},"
    if any(row.get("step", 0) for row in rows.read(folder / "starts.jsonl")):
        return "was resumed from a checkpoint before"
    last = max(map(step_of, (folder / "batches").glob("step_*.safetensors")), default=0)
    if last > done:  # a step's batch is saved before its row
        return f"has a saved batch of step {last}, a record of {done} steps"
    return ""


def set_aside(folder: Path) -> None:
    """Move all that a run folder holds, but its lock, to earlier/NUMBER in it."""
    names = [path for path in folder.iterdir() if path.name not in ("run.lock", EARLIER)]
    if not names:
        return
    numbers = [int(path.name) for path in (folder / EARLIER).glob("[0-9]*")]
    target = folder / EARLIER / f"{max(numbers, default=0) + 1:03d}"
    target.mkdir(parents=True)
    for path in names:
        os.replace(path, target / path.name)
    sync(target)
    sync(folder)


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Say what to do about errors that are about the machine; the record so far is kept."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OperationFailed(
            f"out of memory on {config.device}: lower max_tokens_per_microbatch ({config.max_tokens_per_microbatch}), "
            f"max_logits_per_chunk ({config.max_logits_per_chunk}) or generation_batch_size ({config.generation_batch_size}), "
            f"or set checkpointing or offload_teacher; the same command resumes ({error})"
        ) from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OperationFailed(
            f"could not write below {config.out}: is the disk full? What was saved before is "
            f"whole, and the same command resumes from it ({error})"
        ) from error
