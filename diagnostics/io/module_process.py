"""Command line that starts a module of ours in another Python process."""

import sys


def module_command(module: str, *arguments: object) -> list[str]:
    """Return the command line that runs a module as a program.

    `-P` keeps the working directory out of the module search path: a user's own folder `figures` or
    `opd` there would be imported instead of ours.

    Args:
        module: Full name of the module.
        *arguments: Its arguments.

    Returns:
        Words of the command line.
    """
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]
