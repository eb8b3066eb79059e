"""How a command begins and ends: its options; user errors in one line; a closed pipe; Ctrl-C."""

import errno
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from diagnostics.errors import UserError

Options = TypeVar("Options")

EXIT_CLOSED_PIPE, EXIT_INTERRUPTED = 141, 130
"""Exit codes: 128 plus the number of the signal, as a shell reports them."""
REMEDIES = {
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "a file exists where a folder is expected; choose another path",
    errno.EEXIST: "a file exists where a folder is expected; choose another path",
    errno.EROFS: "choose a path on a writable file system",
    errno.ENOSPC: "free some space; the same command resumes",
    errno.EDQUOT: "free some space; the same command resumes",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""Operating-system errors that the user can fix, and how; they are no bugs of the program."""


def run_command(program: str, command: Callable[[], object]) -> None:
    """Run `command` as the main function of a process.

    Args:
        program: Name that starts the error messages.
        command: The function to run.

    Raises:
        SystemExit: With the message of a `UserError` or of an operating-system error on a named
            file; EXIT_CLOSED_PIPE if nobody reads the output any more; EXIT_INTERRUPTED after
            Ctrl-C. All other exceptions pass through with their traceback.
    """
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # raises for a closed pipe here instead of at interpreter exit
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_CLOSED_PIPE) from error
    except KeyboardInterrupt as error:
        raise SystemExit(EXIT_INTERRUPTED) from error
    except UserError as error:
        raise SystemExit(f"{program}: {error}") from error
    except OSError as error:
        if error.errno not in REMEDIES or error.filename is None:
            raise
        raise SystemExit(
            f"{program}: {error.filename}: {error.strerror}; {REMEDIES[error.errno]}"
        ) from error


def parse_options(options: type[Options], arguments: list[str], program: str) -> Options:
    """Parse the arguments of a command into a dataclass, whose attribute docstrings are the help.

    Fields that are dataclasses form a group of options, without a prefix.

    Args:
        options: The dataclass.
        arguments: The arguments; --help prints the help and exits.
        program: The command, for messages.

    Returns:
        The options.
    """
    import tyro

    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(options, args=arguments, prog=program, config=markers)
