"""Files and folders that are on the disk in full under their own name, or not at all.

A rename alone does not survive a power loss: the new name may be on the disk before the content.
So content is written to the disk first, then the name, then the folder that holds the name.
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
    """Yield a temporary path beside `path`; what the block writes there replaces `path` at its end.

    If the block raises, or the process ends, `path` is what it was before.

    Args:
      concurrent: several processes may write the same file at the same time; the last one wins.

    Raises:
      OperationFailed: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = f".{os.getpid()}" if concurrent else ""
    temporary = path.with_name(f"{path.name}{unique}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and is_disk_full(error):
            raise OperationFailed(
                f"could not write {path}: is the disk full? What was there before is unchanged "
                f"({error})"
            ) from error
        raise


def write_text(path: str | Path, text: str, *, concurrent: bool = False) -> None:
    """Replace a file by one with this text, in UTF-8, as `atomic_write` does."""
    with atomic_write(path, concurrent=concurrent) as temporary:
        temporary.write_text(text, "utf-8")


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder its name; an older folder of that name is removed afterwards.

    A process that ends in between leaves the older folder as `target.old`, or both.
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
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that no more can be written.

    Libraries in other languages report it in words, such as "(os error 28)".
    """
    while True:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        said = re.findall(r"(?:os error|Errno) (\d+)", str(error))
        if any(int(number) in DISK_FULL for number in said):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__
