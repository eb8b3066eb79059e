"""The `opd map` command: train methods on pairs of models in many regimes."""

import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.command import parse_options
from opd.experiments.regimes.bank import write_bank
from opd.experiments.regimes.evaluation import evaluate_cell, evaluate_start
from opd.experiments.regimes.methods import METHODS, RunSettings
from opd.experiments.regimes.regimes import REGIMES
from opd.experiments.regimes.runs import Cell, MapFolder, prepare_pair, run_cell

SMALL_REGIMES = ("density-0", "density-1", "density-4")
SMALL_METHODS = ("sampled", "sampled_mask", "lsm", "lsm_mask")
SMALL_PAIRS = 2
NUM_PAIRS = 5
TASKS_PER_PROCESS = 40
"""Runs after which a worker process is replaced, so that its memory does not grow."""


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """Train methods on pairs of models in many regimes, and resume what was interrupted."""

    preset: Literal["small", "full"] = "full"
    """small: three regimes, four methods, two pairs, twenty minutes on two cores; full: six hours;
    what --regimes, --methods and --pairs name replaces that of the preset"""
    regimes: tuple[str, ...] = ()
    """regimes (opd.experiments.regimes.regimes), such as density-1"""
    methods: tuple[str, ...] = ()
    """methods (opd.experiments.regimes.methods)"""
    pairs: int = 0
    """pairs of models in each regime"""
    first_pair: int = 0
    """seed of the first pair; settings are chosen with others than are reported"""
    split: Literal["test", "validation"] = "test"
    """problems of the evaluations: settings are chosen on validation and reported on test"""
    steps: int = RunSettings.steps
    """training steps of each run"""
    lr: float | None = None
    """learning rate of all methods, in the place of their own"""
    jobs: int = 2
    """processes, with one thread each"""
    root: Path = Path("results/map")
    """folder of models and runs"""
    evaluate: bool = False
    """also measure calibration, recovery from an error, forgetting, the teacher's ceiling and the
    cost of each run (docs/evaluation.md), to evaluation.json in its folder"""
    bank: Path | None = None
    """also write the finished runs with the measurements of their pairs to this CSV file, for
    `opd scout --bank`"""

    def __post_init__(self) -> None:
        for option, names, known in (
            ("--regimes", self.regimes, REGIMES),
            ("--methods", self.methods, METHODS),
        ):
            for name in names:
                if name not in known:
                    raise InvalidInput(f"{option}: unknown {name!r}; known: {', '.join(known)}")
        for option, value, smallest in (
            ("--pairs", self.pairs, 0),
            ("--first-pair", self.first_pair, 0),
            ("--jobs", self.jobs, 1),
            ("--steps", self.steps, 1),
        ):
            if value < smallest:
                raise InvalidInput(f"{option} is {value}; it must be at least {smallest}")


def cells_to_run(options: MapOptions) -> list[Cell]:
    """Return the cells that the options name, regime by regime.

    Args:
        options: The options.

    Returns:
        The cells. Without --methods, those of the preset or of the regime.
    """
    small = options.preset == "small"
    regimes = options.regimes or (SMALL_REGIMES if small else tuple(REGIMES))
    num_pairs = options.pairs or (SMALL_PAIRS if small else NUM_PAIRS)
    cells = []
    for regime in regimes:
        methods = options.methods or (SMALL_METHODS if small else REGIMES[regime].methods)
        cells += [
            Cell(regime, method, options.first_pair + number)
            for number in range(num_pairs)
            for method in methods
        ]
    return cells


def main(argv: list[str]) -> None:
    """Run `opd map [--preset small] [--regimes R ...] [--methods M ...] [--pairs N]`."""
    options = parse_options(MapOptions, argv, "opd map")
    folder, cells = MapFolder(options.root), cells_to_run(options)
    failure = None
    try:
        run_cells(folder, cells, options)
    except OperationFailed as error:
        failure = error
    # where every run failed, there is no bank, and the failure is what matters
    if options.bank is not None and any(folder.is_finished(cell) for cell in cells):
        print(write_bank(folder, cells, options.bank))
    if failure is not None:
        raise failure
    runs = options.root / "runs"
    print(f"{len(cells)} runs are in {runs}; draw them with `opd figures dose --run {runs}/*/*`")


def run_cells(folder: MapFolder, cells: Sequence[Cell], options: MapOptions) -> None:
    """Build the pairs of some cells, train the cells and, if wanted, evaluate them.

    Args:
        folder: Folder of the map.
        cells: The cells.
        options: The options.

    Raises:
        OperationFailed: A pair, a run or an evaluation failed.
    """
    pairs = list(dict.fromkeys((cell.regime, cell.pair) for cell in cells))
    run_all("pairs", prepare_pair, [(folder, *pair) for pair in pairs], options)
    settings = RunSettings(options.split, options.steps, options.lr)
    run_all("runs", run_cell, [(folder, cell, settings) for cell in cells], options)
    if options.evaluate:
        starts = [(folder, *pair, settings) for pair in pairs]
        run_all("evaluations of students", evaluate_start, starts, options)
        finals = [(folder, cell, settings) for cell in cells]
        run_all("evaluations of runs", evaluate_cell, finals, options)


def run_all(
    name: str,
    function: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    options: MapOptions,
) -> None:
    """Call a function in worker processes, and report what failed at the end.

    Args:
        name: What the calls make, for the progress bar.
        function: The function.
        arguments: Arguments of each call.
        options: The options.

    Raises:
        OperationFailed: A call failed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the worker processes when they import torch
    failures: list[str] = []
    with concurrent.futures.ProcessPoolExecutor(
        options.jobs,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=TASKS_PER_PROCESS,
    ) as pool:
        label_by_future = {
            pool.submit(function, *values): " ".join(map(str, values[1:])) for values in arguments
        }
        finished = concurrent.futures.as_completed(label_by_future)
        for future in tqdm(finished, total=len(arguments), desc=name, disable=None):
            if future.exception() is not None:
                failures.append(f"{label_by_future[future]}: {future.exception()}")
                print(failures[-1], file=sys.stderr)
    if failures:
        raise OperationFailed(
            f"{len(failures)} of {len(arguments)} {name} failed, see {options.root / 'logs'}; run "
            "the same command again to continue"
        )
