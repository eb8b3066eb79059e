"""Trainers in processes of their own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.floor.trainers import TRAINERS, Size, settings_of


def start_process(name: str, size: Size, threads: int) -> dict[str, Any]:
    """Run a trainer in a new process and return what it measured."""
    line = [sys.executable, "-m", "benchmarks.floor", "--process", name]
    line.append(json.dumps(settings_of(size)))
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment = os.environ | quiet | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{process.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return result


def run_process(name: str, settings: str) -> None:
    """Run a trainer in this process and print what it measured as JSON."""
    size = Size(**json.loads(settings))
    print(json.dumps(TRAINERS[name](replace(size, folder=Path(size.folder)))))
