"""Running of an `opd` command in a separate process."""

import os
import subprocess
import sys

from diagnostics.errors import OperationFailed
from diagnostics.io.module_process import module_command


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
    result = subprocess.run(
        module_command("opd.cli.main", *words), env=environment, stdout=sys.stderr, check=False
    )
    if result.returncode:
        raise OperationFailed(
            f"`opd {' '.join(map(str, words))}` exited with code {result.returncode}"
        )
