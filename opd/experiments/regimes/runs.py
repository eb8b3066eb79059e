"""Pairs and runs of the map, each in a folder of its own; what is finished is kept."""

import contextlib
import json
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.io.atomic import write_text
from opd.experiments.regimes.methods import RunSettings, train_config
from opd.experiments.regimes.regimes import REGIMES
from opd.lab.family import build_pair

NUM_ROLLOUTS = 256
"""Rollouts of the student from which a pair is measured before training."""


@dataclass(frozen=True)
class Cell:
    """One run of the map."""

    regime: str
    """One of REGIMES."""
    method: str
    """One of METHODS."""
    pair: int
    """Seed of the pair of models, and of prompts and sampling."""

    def __str__(self) -> str:
        return f"{self.regime}/{self.method}-{self.pair}"


@dataclass(frozen=True)
class MapFolder:
    """The folder of a map: pairs/REGIME-SEED, bases, runs/REGIME/METHOD-SEED and logs."""

    root: Path
    """The folder."""

    def pair(self, regime: str, seed: int) -> Path:
        """Return the folder of a pair of models."""
        return self.root / "pairs" / f"{regime}-{seed}"

    def run(self, cell: Cell) -> Path:
        """Return the run folder of a cell."""
        return self.root / "runs" / cell.regime / f"{cell.method}-{cell.pair}"

    def is_finished(self, cell: Cell) -> bool:
        """Return whether the run of a cell has a final model."""
        return (self.run(cell) / "final").exists()

    def record(self, regime: str, seed: int) -> dict[str, Any]:
        """Return what pair.json of a pair holds."""
        record: dict[str, Any] = json.loads((self.pair(regime, seed) / "pair.json").read_text())
        return record

    def measurements(self, regime: str, seed: int) -> Path:
        """Return the file of what was measured on a pair before training."""
        return self.root / "measurements" / f"{regime}-{seed}.json"

    def start_evaluation(self, regime: str, seed: int, split: str) -> Path:
        """Return the file of the evaluation of a pair's student before training."""
        return self.root / "measurements" / f"{regime}-{seed}-{split}.json"

    def evaluation(self, cell: Cell, split: str) -> Path:
        """Return the file of the evaluation of a run's final model on a split."""
        name = "evaluation.json" if split == "test" else f"evaluation-{split}.json"
        return self.run(cell) / name


def prepare_pair(folder: MapFolder, regime: str, seed: int) -> None:
    """Build a pair of models and measure it, unless that is done.

    Args:
        folder: Folder of the map.
        regime: One of REGIMES.
        seed: Seed of the pair.
    """
    from filelock import FileLock

    from opd.analysis.scout.measure import pair_measurements

    with logged(folder.root / "logs" / f"pair-{regime}-{seed}.log"):
        pair = folder.pair(regime, seed)
        # pairs of one seed share their base models
        with FileLock(folder.root / f"bases-{seed}.lock"):
            student, teacher = build_pair(pair, REGIMES[regime].knobs, seed, folder.root / "bases")
        path = folder.measurements(regime, seed)
        if not path.exists():
            record = folder.record(regime, seed)
            measurements = pair_measurements(
                str(student),
                str(teacher),
                str(pair / "validation.jsonl"),
                max_prompt=record["limits"]["max_prompt"],
                max_response=record["limits"]["max_response"],
                rollouts=NUM_ROLLOUTS,
                seed=seed,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(measurements, indent=1) + "\n")


def run_cell(folder: MapFolder, cell: Cell, settings: RunSettings) -> None:
    """Train a cell, or resume it, in this process.

    Args:
        folder: Folder of the map, with the cell's pair.
        cell: The cell.
        settings: Settings of the map.
    """
    from opd.training.train import train

    config = train_config(
        cell.method,
        folder.pair(cell.regime, cell.pair),
        folder.record(cell.regime, cell.pair),
        cell.pair,
        settings,
        folder.run(cell),
    )
    with logged(folder.root / "logs" / f"{str(cell).replace('/', '-')}.log"):
        train(config)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write what a block prints, and its error, to a file.

    Args:
        path: The file.

    Yields:
        Nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        print(f"process {os.getpid()}", file=log)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=log)
            raise
