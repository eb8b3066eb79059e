"""The bank of runs for `opd scout`: what each pair was like before training, and each outcome."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.records.run_folder import RunFolder
from opd.experiments.regimes.regimes import REGIMES
from opd.experiments.regimes.runs import Cell, MapFolder

COLLAPSE_SHARE = 0.5
"""A run collapses if an evaluation falls below this share of its best earlier one."""
DIGITS = 6
"""Significant digits of the numbers of a bank."""
NUM_EXAMPLES = 3
"""Cells that a message names."""


def write_bank(folder: MapFolder, cells: Sequence[Cell], path: Path) -> str:
    """Write the finished runs of a map as a bank (`opd.analysis.scout.bank`), all or none of them.

    Args:
        folder: Folder of the map.
        cells: Its cells; those that are not finished are left out.
        path: The CSV file.

    Returns:
        A line for the user: the file, the number of runs, and which cells it lacks.

    Raises:
        InvalidInput: No cell is finished, or the pair of a finished one was not measured, or
            otherwise than the others.
    """
    finished = [cell for cell in cells if folder.is_finished(cell)]
    if not finished:
        raise InvalidInput(f"{folder.root} has no finished run of these cells")
    rows = [bank_row(folder, cell) for cell in finished]
    for cell, row in zip(finished, rows, strict=True):
        if list(row) != list(rows[0]):
            names = ", ".join(sorted(row.keys() ^ rows[0].keys())) or "their order"
            measured = folder.measurements(cell.regime, cell.pair)
            raise InvalidInput(
                f"{measured} and that of {finished[0]} differ in what was measured ({names}); "
                "remove the older one and run the same command again"
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    missing = [str(cell) for cell in cells if cell not in finished]
    if not missing:
        return f"{path}: {len(rows)} runs"
    examples = ", ".join(missing[:NUM_EXAMPLES]) + (", ..." if len(missing) > NUM_EXAMPLES else "")
    return (
        f"{path}: {len(rows)} of {len(cells)} runs; it lacks {examples}, which are not finished: "
        "run the same command again"
    )


def bank_row(folder: MapFolder, cell: Cell) -> dict[str, Any]:
    """Return the row of a finished run.

    Args:
        folder: Folder of the map.
        cell: The cell.

    Returns:
        pair, family, seed, method, start, final, gain, collapsed, and the measurements of the pair.

    Raises:
        InvalidInput: The pair was not measured.
    """
    evaluations = sorted(RunFolder(folder.run(cell)).evaluations(), key=lambda row: row["step"])
    accuracies = [float(row["accuracy"]) for row in evaluations]
    measured = folder.measurements(cell.regime, cell.pair)
    if not measured.exists():
        raise InvalidInput(
            f"the pair of {cell} was not measured before training: there is no {measured}; run "
            "`opd map` for this regime and pair, which makes it"
        )
    measurements = json.loads(measured.read_text())
    start, final = (float(f"{accuracies[i]:.{DIGITS}g}") for i in (0, -1))
    return {
        "pair": f"{cell.regime}-{cell.pair}",
        "family": REGIMES[cell.regime].family,
        "seed": cell.pair,
        "method": cell.method,
        "start": start,
        "final": final,
        "gain": float(f"{final - start:.{DIGITS}g}"),
        "collapsed": str(has_collapsed(accuracies)).lower(),
        **{name: f"{value:.{DIGITS}g}" for name, value in measurements.items()},
    }


def has_collapsed(accuracies: Sequence[float]) -> bool:
    """Return whether an accuracy falls below COLLAPSE_SHARE of the best one before it."""
    best = accuracies[0]
    for accuracy in accuracies[1:]:
        if accuracy < COLLAPSE_SHARE * best:
            return True
        best = max(best, accuracy)
    return False
