"""How a command ends: errors for the user in one line, a closed pipe and Ctrl-C in silence."""

import errno
import os
import sys
from collections.abc import Callable

from diagnostics.errors import UserError

CLOSED_PIPE, INTERRUPTED = 141, 130
"""Exit codes: 128 and the number of the signal, as a shell reports them."""
REMEDIES = {
    errno.EACCES: "change its mode, or name another place",
    errno.EPERM: "change its mode, or name another place",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a file stands where a folder is expected; name another place",
    errno.EEXIST: "a file stands where a folder is expected; name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "free some space; the same command goes on",
    errno.EDQUOT: "free some space; the same command goes on",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""Errors of the operating system that are the user's to mend, not faults of the program."""


def run_command(program: str, command: Callable[[], object]) -> None:
    """Call `command` as the whole of a process.

    Raises:
      SystemExit: with the message of a `UserError` or of an error of the operating system on a
        named file; CLOSED_PIPE where nobody reads the output any more; INTERRUPTED after Ctrl-C.
        All other exceptions pass, with their traceback.
    """
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # a pipe that was closed shows here, and not while Python ends
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE) from error
    except KeyboardInterrupt as error:
        raise SystemExit(INTERRUPTED) from error
    except UserError as error:
        raise SystemExit(f"{program}: {error}") from error
    except OSError as error:
        if error.errno not in REMEDIES or error.filename is None:
            raise
        raise SystemExit(
            f"{program}: {error.filename}: {error.strerror}; {REMEDIES[error.errno]}"
        ) from error
