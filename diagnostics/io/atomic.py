"""Atomic writes: a file or folder is on the disk in full under its own name, or not at all.

A rename alone does not survive a power loss: the new name may reach the disk before the content.
So the content is written to the disk first, then the name, then the folder that holds the name.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diagnostics.errors import OperationFailed

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space on the device, quota exceeded, file too large."""


@contextmanager
def atomic_write(path: str | Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` that replaces `path` when the block ends.

    If the block raises, or the process ends, `path` is unchanged.

    Args:
        path: The file to write.
        concurrent: Several processes may write the same file at the same time; the last one wins.

    Yields:
        The temporary path to write to.

    Raises:
        OperationFailed: The disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    process_suffix = f".{os.getpid()}" if concurrent else ""
    temporary = path.with_name(f"{path.name}{process_suffix}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and is_disk_full(error):
            raise OperationFailed(
                f"could not write {path}: is the disk full? An existing file is unchanged ({error})"
            ) from error
        raise


def write_text(path: str | Path, text: str, *, concurrent: bool = False) -> None:
    """Replace the content of a file by this text, in UTF-8, with `atomic_write`."""
    with atomic_write(path, concurrent=concurrent) as temporary:
        temporary.write_text(text, "utf-8")


def replace_folder(source: Path, target: Path) -> None:
    """Rename a finished folder to its final name, then remove an older folder of that name.

    A process that ends in between leaves the older folder as `target.old`, or both.

    Args:
        source: The finished folder.
        target: Its final name.
    """
    for folder, _, names in os.walk(source):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file system without fsync
            raise
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, says that the disk is full.

    Libraries in other languages report it as text, such as "(os error 28)".

    Args:
        error: The error to classify.

    Returns:
        True for the error numbers in DISK_FULL.
    """
    while True:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error_codes = re.findall(r"(?:os error|Errno) (\d+)", str(error))
        if any(int(number) in DISK_FULL for number in error_codes):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__
