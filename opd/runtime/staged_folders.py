"""Run folders that are written atomically: complete under their final name, or not at all."""

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
def staged_folder(final: Path) -> Iterator[Path]:
    """Write into a temporary folder, which is renamed when the block succeeds.

    All ranks must enter the block and may write; the folder is renamed when all have finished.

    Args:
        final: The final name.

    Yields:
        The temporary folder.

    Raises:
        OperationFailed: A file could not be written; an existing folder stays unchanged.
    """
    import torch

    staging = final.with_name(final.name + ".part")
    if distributed.rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    distributed.barrier()
    try:
        yield staging
        distributed.barrier()
        if distributed.rank() == 0:
            replace_folder(staging, final)
    except torch.OutOfMemoryError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk with their own exceptions
        shutil.rmtree(staging, ignore_errors=True)
        hint = ": is the disk full?" if is_disk_full(error) else "."
        raise OperationFailed(
            f"could not write {final} ({error}){hint} Earlier checkpoints are intact; run the same "
            "command again to resume from the last one"
        ) from error
    distributed.barrier()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    folders = [
        path
        for path in (folder / "checkpoints").glob("step_*")
        if path.is_dir() and re.fullmatch(r"step_\d+", path.name)
    ]
    return sorted(folders, key=step_number)


def step_number(path: Path) -> int:
    """Return the step number in the name of a checkpoint or saved batch."""
    return int(path.stem.removeprefix("step_"))


def remove_folder(folder: Path) -> None:
    """Rename and delete a folder, so that a kill leaves no incomplete folder of its name."""
    renamed = folder.with_name(folder.name + ".part")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed)
