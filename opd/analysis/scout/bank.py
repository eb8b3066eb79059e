"""The bank of runs: one row per run, with the measurements of its pair and what became of it.

`figures/data/scout.csv`, part of the package, is made from the runs of the map of regimes; any
other table with the same columns can take its place. The columns are pair, family, seed, method,
start, final, gain, collapsed, and the measurements of `opd.analysis.scout.measure`.

Shapes: n runs, d features.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.files import read_text
from diagnostics.io.recorded_data import recorded_data

Array = NDArray[Any]
OUTCOMES = ("pair", "family", "seed", "method", "start", "final", "gain", "collapsed")
"""Columns of a bank beside the measurements."""
MIN_METHOD_PAIRS = 5
"""Fewest pairs of a method that is forecast."""

FLOOR = 1e-4
"""Smallest positive value of a feature on a logarithmic scale."""


def _log(value: float) -> float:
    """Return the logarithm of a number of which FLOOR or less means none."""
    return math.log(max(value, FLOOR)) if math.isfinite(value) else math.nan


def _signed_log(value: float) -> float:
    """Return sign(x) log(1 + |x|), for gaps of a few to tens of nats."""
    return math.copysign(math.log1p(abs(value)), value)


def _identity(value: float) -> float:
    return value


FEATURES: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "student_accuracy": ("student_accuracy", _identity),
    "accuracy_gap": ("accuracy_gap", _identity),
    "continuation_gain": ("continuation_gain", _identity),
    "log_reverse_kl": ("reverse_kl", _log),
    "log_forward_kl": ("forward_kl", _log),
    "log_length": ("length", _log),
    "truncated_share": ("truncated_share", _identity),
    "topk_overlap": ("topk_overlap", _identity),
    "log_outside_top16": ("outside_top16", _log),
    "entropy_gap": ("entropy_gap", _identity),
    "special_signal": ("special_signal", _identity),
    "special_gap": ("special_gap", _signed_log),
    "impossible_signal": ("impossible_signal", _identity),
    "one_id_signal": ("one_id_signal", _identity),
    "log_snr": ("snr", _log),
}
"""Feature of the forecast -> measurement and its scale."""

PREDICTORS: Mapping[str, str] = {
    "initial KL": "log_reverse_kl",
    "top-K overlap": "topk_overlap",
    "entropy gap": "entropy_gap",
    "accuracy gap": "accuracy_gap",
}
"""Single predictors of published work (arXiv 2605.30070, 2604.13016), and the obvious one, with
their features."""


def pair_features(measurements: Mapping[str, float]) -> Array:
    """Return the (d,) features of a pair, in the order of FEATURES.

    Args:
        measurements: Measurements by name (`opd.analysis.scout.measure.measure_pair`).

    Returns:
        The features; NaN where a measurement is not defined.

    Raises:
        InvalidInput: A measurement is missing.
    """
    missing_names = sorted({name for name, _ in FEATURES.values()} - measurements.keys())
    if missing_names:
        raise InvalidInput(
            f"the measurements lack {', '.join(missing_names)}; measure the pair again with this "
            "version of opdlab"
        )
    return np.array([scale(float(measurements[name])) for name, scale in FEATURES.values()])


@dataclass(frozen=True, kw_only=True, eq=False)
class Bank:
    """Runs with the features of their pairs and their outcomes."""

    pair: Array
    """(n,) ids of pairs, text."""
    family: Array
    """(n,) families of regimes, text."""
    seed: Array
    """(n,) seeds, text; pairs with equal seeds may share models, in several regimes."""
    method: Array
    """(n,) methods, text."""
    features: Array
    """(n, d) in the order of FEATURES; NaN where a measurement is not defined."""
    start: Array
    """(n,) accuracy before training."""
    gain: Array
    """(n,) accuracy after training minus before."""
    collapsed: Array
    """(n,) bool, whether the run collapsed."""

    def __len__(self) -> int:
        return len(self.pair)

    def rows(self, index: Array) -> "Bank":
        """Return the selected runs; a bool mask or integers."""
        return Bank(**{name: column[index] for name, column in vars(self).items()})

    @property
    def methods(self) -> list[str]:
        """Methods with enough pairs for a forecast, sorted."""
        return [
            str(name)
            for name in np.unique(self.method)
            if len(np.unique(self.pair[self.method == name])) >= MIN_METHOD_PAIRS
        ]

    def describe(self) -> str:
        """Return the numbers of runs, pairs, families and methods in words."""
        counts = (len(np.unique(x)) for x in (self.pair, self.family, self.method))
        pairs, families, methods = counts
        return f"{len(self)} runs of {pairs} pairs in {families} families, {methods} methods"


def recorded_bank() -> Path:
    """Return the path of the bank that comes with the package."""
    return recorded_data() / "scout.csv"


def read_bank(path: Path) -> Bank:
    """Read a bank of runs.

    Args:
        path: A CSV file with the columns of OUTCOMES and the measurements that FEATURES names.

    Returns:
        The runs.

    Raises:
        MissingFile: There is no such file.
        InvalidInput: Missing columns, a value that is not a number, a gain that is not final minus
            start, a run that is given twice, or a pair in two families.
    """
    rows = list(csv.DictReader(read_text(path).splitlines()))
    if not rows:
        raise InvalidInput(f"{path} has no runs; make it with the map of regimes")
    columns = {*OUTCOMES, *(name for name, _ in FEATURES.values())}
    if absent := sorted(columns - rows[0].keys()):
        raise InvalidInput(f"{path} lacks the columns {', '.join(absent)}; see docs/scout.md")
    seen: dict[tuple[str, ...], int] = {}
    families: dict[str, str] = {}
    for line, row in enumerate(rows, 2):
        key = (row["pair"], row["method"], row["seed"])
        if key in seen:
            raise InvalidInput(
                f"{path}, line {line}: pair {key[0]}, method {key[1]}, seed {key[2]} is also line "
                f"{seen[key]}; keep one"
            )
        seen[key] = line
        if families.setdefault(row["pair"], row["family"]) != row["family"]:
            raise InvalidInput(
                f"{path}, line {line}: pair {row['pair']} is of family {row['family']} and of "
                f"{families[row['pair']]}; give each pair one family"
            )
    return Bank(
        pair=np.array([row["pair"] for row in rows]),
        family=np.array([row["family"] for row in rows]),
        seed=np.array([row["seed"] for row in rows]),
        method=np.array([row["method"] for row in rows]),
        features=np.array(
            [
                pair_features({name: _number(path, line, row, name) for name in columns - TEXTS})
                for line, row in enumerate(rows, 2)
            ]
        ),
        **_outcomes(path, rows),
    )


TEXTS = {"pair", "family", "seed", "method", "collapsed"}
"""Columns that are not numbers."""
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _outcomes(path: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, Array]:
    """Return the columns start, gain and collapsed, checked."""
    start, final, gain = (
        np.array([_number(path, line, row, name) for line, row in enumerate(rows, 2)])
        for name in ("start", "final", "gain")
    )
    invalid = ~(np.abs(final - start - gain) <= 1e-6)
    if invalid.any():
        i = int(invalid.argmax())
        raise InvalidInput(
            f"{path}, line {i + 2}: gain is {gain[i]:g}, but final - start is "
            f"{final[i]:g} - {start[i]:g}; correct the row"
        )
    collapsed = []
    for line, row in enumerate(rows, 2):
        text = row["collapsed"].strip().lower()
        if text not in TRUTH:
            raise InvalidInput(
                f"{path}, line {line}: collapsed is {row['collapsed']!r}; write true or false"
            )
        collapsed.append(TRUTH[text])
    return {"start": start, "gain": gain, "collapsed": np.array(collapsed)}


def _number(path: Path, line: int, row: Mapping[str, str], name: str) -> float:
    text = row[name]
    try:
        return float(text) if text else math.nan
    except ValueError as error:
        raise InvalidInput(f"{path}, line {line}: {name} is {text!r}; expected a number") from error
