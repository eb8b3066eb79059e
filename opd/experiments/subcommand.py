"""Running of an `opd` command in a separate process."""

import os
import subprocess
import sys

from diagnostics.errors import OperationFailed


def run_opd(*words: object, threads: int | None = None) -> None:
    """Run an `opd` command in a separate process; its output goes to stderr.

    Args:
        *words: The command and its arguments.
        threads: Number of OpenMP threads; None leaves the environment unchanged.

    Raises:
        OperationFailed: The command failed.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command_line = [sys.executable, "-m", "opd.cli.main", *map(str, words)]
    result = subprocess.run(command_line, env=environment, stdout=sys.stderr, check=False)
    if result.returncode:
        raise OperationFailed(
            f"`opd {' '.join(map(str, words))}` exited with code {result.returncode}"
        )
