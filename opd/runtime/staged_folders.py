"""Folders of a run that appear whole under their name, or not at all."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diagnostics.errors import OperationFailed
from diagnostics.io.atomic import is_disk_full, replace_folder
from opd.runtime import distributed


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Write into a temporary folder that takes the final name only when the block succeeds.

    Every process of a run has to enter; all may write, and the name is taken when all have.

    Raises:
      OperationFailed: something could not be written; what was there before stays.
    """
    import torch

    part = final.with_name(final.name + ".part")
    if distributed.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    distributed.barrier()
    try:
        yield part
        distributed.barrier()
        if distributed.rank() == 0:
            replace_folder(part, final)
    except torch.OutOfMemoryError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk in words of their own
        shutil.rmtree(part, ignore_errors=True)
        question = ": is the disk full?" if is_disk_full(error) else "."
        raise OperationFailed(
            f"could not write {final} ({error}){question} What was saved before is whole, and the "
            "same command resumes from it"
        ) from error
    distributed.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run folder, oldest first."""
    finished = [
        path
        for path in (folder / "checkpoints").glob("step_*")
        if path.is_dir() and re.fullmatch(r"step_\d+", path.name)
    ]
    return sorted(finished, key=step_of)


def step_of(path: Path) -> int:
    """The number in the name of a checkpoint, or of a saved batch."""
    return int(path.stem.removeprefix("step_"))


def remove(folder: Path) -> None:
    """Delete a folder so that a kill midway leaves no half of it under its own name."""
    doomed = folder.with_name(folder.name + ".part")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
