"""Errors whose message is written for the user.

A command prints the message of a `UserError` in one line, without a traceback. Every other
exception, from libraries or from bugs of this package, keeps its traceback. Each class below is
also the built-in exception that callers of the library expect.
"""

from diagnostics.terminal import escape_control_chars


class UserError(Exception):
    """An error whose message names the offending value and the remedy.

    Quoted values may come from untrusted sources, so control characters in the message are escaped
    (`escape_control_chars`).
    """

    def __str__(self) -> str:
        return escape_control_chars(Exception.__str__(self))


class InvalidInput(UserError, ValueError):
    """An argument, a setting, a file or a row holds a value that cannot be used."""


class OperationFailed(UserError, RuntimeError):
    """Something outside the program failed: a device, a disk, a server, another process."""


class MissingFile(UserError, FileNotFoundError):
    """A named file or folder does not exist."""


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class BrokenPackage(UserError, ImportError):
    """An optional package is installed but cannot be imported; the message says why."""
