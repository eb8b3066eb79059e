"""The run folder: the only record of a run, never half-written.

config.json, code.txt, rows.jsonl (one row a step), evals.jsonl, batches/, checkpoints/, final/.
"""

import fcntl
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diagnostics import rows
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.rows import Row
from opd import processes
from opd.config import Config, to_json

FREE_TO_CHANGE = (
    *("steps", "out", "eval_every", "save_every", "batch_every", "probe_every", "loggers"),
    *("micro_tokens", "chunk_elements", "rows_at_once", "checkpointing", "offload_teacher"),
    *("teacher_patience", "teacher_requests", "rollout_patience", "rollout_requests"),
    *("rollout_servers", "weights_folder", "sharding"),
)
"""Settings that say how far, how often or where, and not what is computed."""


@contextmanager
def open_run(config: Config) -> Iterator[Path]:
    """The run folder of `config`, locked against a second process while in use.

    Only the first of a run's processes writes in it; the others wait for it to be ready.

    Raises:
      ValueError: the folder holds a run with other settings; names them.
      RuntimeError: another process is writing to the folder.
    """
    folder = Path(config.out)
    if processes.rank() > 0:
        processes.barrier()
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OperationFailed(f"another process is writing to {folder}") from None
        refuse_other_settings(folder, config)
        write_text(folder / "config.json", json.dumps(to_json(config), indent=1))
        if not (folder / "code.txt").exists():
            write_text(folder / "code.txt", code_state())
        processes.barrier()
        yield folder


def refuse_other_settings(folder: Path, config: Config) -> None:
    record = [folder / name for name in ("rows.jsonl", "evals.jsonl")]
    begun = any(path.exists() and path.stat().st_size for path in record)
    if not (folder / "config.json").exists():
        if begun:
            raise InvalidInput(f"{folder} has a record but no config.json; choose another --out")
        return
    if not begun:  # a run that never began, such as one whose task was not found
        return
    old, new = json.loads((folder / "config.json").read_text()), to_json(config)
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    changed = [k for k in changed if k not in FREE_TO_CHANGE]
    if changed:
        what = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
        raise InvalidInput(
            f"{folder} holds a run with other settings ({what}); choose another --out, or delete "
            "the folder to start again"
        )


def rewind(path: Path, keep: Callable[[Row], bool]) -> None:
    """Drop the rows that a resumed run will write again."""
    kept = [row for row in rows.read(path) if keep(row)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def write_text(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Write into a temporary folder that takes the final name only when the block succeeds.

    Every process of a run has to enter; all may write, and the name is taken when all have.

    Raises:
      RuntimeError: something could not be written; what was there before stays.
    """
    part = final.with_name(final.name + ".part")
    if processes.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    processes.barrier()
    try:
        yield part
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors tell a full disk in words of their own
        shutil.rmtree(part, ignore_errors=True)
        raise OperationFailed(
            f"could not write {final} ({error}): is the disk full? What was saved before is whole, "
            "and the same command resumes from it"
        ) from error
    processes.barrier()
    if processes.rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    processes.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = (folder / "checkpoints").glob("step_*")
    return sorted(p for p in found if p.is_dir() and not p.name.endswith(".part"))


def remove(folder: Path) -> None:
    """Delete a folder so that a kill midway leaves no half of it under its own name."""
    doomed = folder.with_name(folder.name + ".part")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def code_state() -> str:
    """Commit and uncommitted difference of the code that runs, or that it is unknown."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout

    try:
        return f"commit {git('rev-parse', 'HEAD')}\n{git('diff', 'HEAD', '--', '*.py')}"
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown: not a git checkout\n"
