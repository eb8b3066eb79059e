"""Run an `opd` command in a process of its own."""

import os
import subprocess
import sys

from diagnostics.errors import OperationFailed


def command(*words: object, threads: int | None = None) -> None:
    """Run `opd WORDS` in a process of its own, as a user would; what it says goes to stderr."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    line = [sys.executable, "-m", "opd.cli.main", *map(str, words)]
    done = subprocess.run(line, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise OperationFailed(f"`opd {' '.join(map(str, words))}` ended with {done.returncode}")
