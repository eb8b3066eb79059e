"""Run folders by method, their saved batches, their rows by position; needs no torch."""

import json
import re
from pathlib import Path

import numpy as np

from diagnostics.errors import MissingFile
from diagnostics.rows import Row

BIN = re.compile(r"@(\d+)-(\d+)$")


def methods(runs: list[Path]) -> dict[str, list[Path]]:
    """Run folders by method: the name of a folder METHOD-SEED, or all of another name.

    Raises:
      FileNotFoundError: a folder is not a run folder.
    """
    found: dict[str, list[Path]] = {}
    for run in runs:
        if not (run / "config.json").exists():
            raise MissingFile(f"{run} is no run folder: it has no config.json")
        seed = json.loads((run / "config.json").read_text())["seed"]
        found.setdefault(run.name.removesuffix(f"-{seed}"), []).append(run)
    return found


def saved(runs: list[Path]) -> list[int]:
    """Steps at which every one of these runs saved a batch, rising.

    Raises:
      FileNotFoundError: there is none.
    """
    steps = [
        {int(p.stem.split("_")[1]) for p in (run / "batches").glob("step_*.safetensors")}
        for run in runs
    ]
    common = sorted(set.intersection(*steps))
    if not common:
        names = ", ".join(str(run) for run in runs)
        raise MissingFile(f"no step at which all of {names} saved a batch; see --batch-every")
    return common


def batch_path(run: Path, step: int) -> Path:
    return run / "batches" / f"step_{step:06d}.safetensors"


def bins(row: Row, name: str) -> dict[tuple[int, int], float]:
    """{(first, last position): value} of a metric in the position bins of a row; nulls are NaN."""
    found = {}
    for key, value in row.items():
        match = BIN.search(key)
        if match and key[: match.start()] == name:
            low, high = map(int, match.groups())
            found[low, high] = float("nan") if value is None else float(value)
    return dict(sorted(found.items()))


def pooled(values: list[float], errors: list[float], weights: list[float]) -> tuple[float, float]:
    """Weighted mean of independent values and its standard error, from theirs."""
    w = np.array(weights) / np.sum(weights)
    return float((w * values).sum()), float(np.sqrt((w**2 * np.square(errors)).sum()))


def short(x: float) -> float:
    """x to five significant digits, as tables keep it."""
    return float(f"{x:.5g}")
