"""What the final models of a map are like beside their accuracy, from their evaluations.

`opd map --evaluate` writes evaluation.json into the folder of each run, and the same measures of
the student before training beside those of its pair (`opd.evaluation.folder.measure_folder`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.records.run_folder import RunFolder
from diagnostics.stats import round_significant, runs_interval
from figures.collect.regimes import PAIR_KNOBS, PAIR_MEASUREMENTS, pair_columns

MEASURES = {
    "accuracy": ("accuracy", ""),
    "closed": ("teacher/closed", "teacher/closed/"),
    "gap": ("gap@{samples}", "gap@{samples}/"),
    "over_confidence": ("calibration/over_confidence", "calibration/over_confidence/"),
    "brier": ("calibration/brier", "calibration/brier/"),
    "ece": ("calibration/ece", "calibration/ece/"),
    "vote_over_confidence": ("vote/over_confidence", "vote/over_confidence/"),
    "unperturbed": ("recovery/unperturbed", "recovery/unperturbed/"),
    "perturbed": ("recovery/perturbed", "recovery/perturbed/"),
    "recovery_loss": ("recovery/loss", "recovery/loss/"),
    "other_accuracy": ("other/accuracy", "other/"),
    "other_gain": ("against/other/gain", "against/other/"),
}
"""Column to the name of a measure (docs/evaluation.md), and what precedes low and high of it."""
SHARES = frozenset({"accuracy", "unperturbed", "perturbed", "other_accuracy", "brier", "ece"})
"""Measures between 0 and 1, to which their intervals are limited."""
COSTS = {
    "response_tokens": "cost/response_tokens",
    "student_tokens": "cost/student_tokens",
    "teacher_tokens": "cost/teacher_tokens",
    "seconds": "cost/seconds",
}
"""Column to the name of a cost of training."""
START = "start"
"""The method of the students before training."""
COLUMNS = (
    *("family", "group", "method", "seed", "samples", *PAIR_KNOBS, *PAIR_MEASUREMENTS),
    *(f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")),
    *COSTS,
)
DIGITS = 5
"""Significant digits of the table."""


def measures_table(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the measures of final models, and of the students before training.

    Args:
        runs: Run folders of `opd map --evaluate`.

    Returns:
        A table with COLUMNS, one row a run and one a pair of models, with the method START. What
        was not measured or is not defined is NaN, such as the cost of a student before training.

    Raises:
        InvalidInput: A run was not evaluated, or does not belong to a map.
    """
    missing = [run for run in runs if not (run / "evaluation.json").exists()]
    if missing:
        raise InvalidInput(
            f"{len(missing)} of {len(runs)} runs have no evaluation.json, such as {missing[0]}; "
            "make it with `opd map --evaluate`, or leave these runs out"
        )
    rows, pairs = [], {}
    for run in runs:
        folder, facts = RunFolder(run), pair_columns(run)
        label = {"group": folder.group, "seed": folder.seed} | facts
        evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        rows.append(label | {"method": folder.method} | measure_columns(evaluation))
        pair = Path(str(folder.settings()["student"])).parent
        pairs[pair.parent.parent / "measurements" / f"{pair.name}-test.json"] = label
    for path, label in pairs.items():
        if not path.exists():
            raise InvalidInput(f"no evaluation of a student in {path}; run `opd map --evaluate`")
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        rows.append(label | {"method": START} | measure_columns(evaluation))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measure_columns(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of an evaluation.

    Args:
        evaluation: Results of `opd.evaluation.folder.measure_folder`.

    Returns:
        samples; MEASURES, each with NAME_low and NAME_high; COSTS.
    """
    columns: dict[str, float] = {"samples": evaluation["samples"]}
    for column, (name, prefix) in MEASURES.items():
        for end, key in (("", name), ("_low", f"{prefix}low"), ("_high", f"{prefix}high")):
            value = evaluation.get(key.format(samples=evaluation["samples"]))
            columns[f"{column}{end}"] = round_significant(value, DIGITS)
    for column, name in COSTS.items():
        columns[column] = round_significant(evaluation.get(name), DIGITS)
    return columns


def summarize_measures(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean of every measure over the pairs of models of a regime.

    Args:
        table: A table with COLUMNS.

    Returns:
        One row a regime and method: regime, family, method, pairs, samples, the means of PAIR_KNOBS
        and PAIR_MEASUREMENTS, MEASURES with NAME_low and NAME_high
        (`diagnostics.stats.runs_interval`) and NAME_pairs, the number of pairs in which it is
        defined, and COSTS with their intervals over pairs.
    """
    records = []
    for (regime, method), rows in table.groupby(["group", "method"], sort=False):
        record: dict[str, Any] = {"regime": regime, "family": rows["family"].iloc[0]}
        record |= {"method": method, "pairs": len(rows), "samples": rows["samples"].iloc[0]}
        record |= {name: rows[name].mean() for name in (*PAIR_KNOBS, *PAIR_MEASUREMENTS)}
        for name in MEASURES:
            defined = rows[rows[name].notna()]
            values, lows, highs = (
                defined[f"{name}{end}"].to_numpy(float) for end in ("", "_low", "_high")
            )
            limits = (0.0, 1.0) if name in SHARES else (-np.inf, np.inf)
            record |= interval_columns(name, values, lows, highs, limits)
            record[f"{name}_pairs"] = len(defined)
        for name in COSTS:
            values = rows[name].dropna().to_numpy(float)
            ends = values if len(values) > 1 else np.full(len(values), np.nan)
            record |= interval_columns(name, values, ends, ends, (0.0, np.inf))
        records.append(record)
    return pd.DataFrame(records)


def interval_columns(
    name: str,
    values: np.ndarray,
    lows: np.ndarray,
    highs: np.ndarray,
    limits: tuple[float, float],
) -> dict[str, float]:
    """Return the mean of a measure over pairs with its interval; NaN where no pair has it.

    Args:
        name: The measure.
        values: (N,) values.
        lows: (N,) lower ends of their intervals over problems.
        highs: (N,) upper ends.
        limits: Smallest and largest value that the measure can have.

    Returns:
        NAME, NAME_low and NAME_high.
    """
    ends = runs_interval(values, lows, highs) if len(values) else (np.nan, np.nan)
    ends = tuple(np.clip(ends, *limits))
    value = float(values.mean()) if len(values) else np.nan
    return dict(zip((name, f"{name}_low", f"{name}_high"), (value, *ends), strict=True))
