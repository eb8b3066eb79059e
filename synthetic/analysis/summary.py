"""Statistics shared by the experiments: rows of repetitions in, a table with intervals out.

A repetition (a world or a seed) is the sampling unit: it is resampled as a whole, so that all its
measurements stay together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.stats import bootstrap_interval

SEED = 2603
"""Seed of the bootstrap; a summary depends on its rows only."""


def interval(
    rows: pd.DataFrame,
    name: str,
    keys: Sequence[str],
    statistic: Callable[..., Any] = np.median,
    unit: str = "seed",
) -> pd.DataFrame:
    """Compute a statistic of `name` over repetitions for each key, with a 95 % bootstrap interval.

    A percentile bootstrap over the (units, keys) table, whose rows are resampled as a whole. A key
    column that the rows lack is empty.

    Args:
        rows: Measurements, at most one per unit and key.
        name: Column of the values.
        keys: Columns that identify a line of the result.
        statistic: Function of an array with an `axis` argument.
        unit: Column of the repetition.

    Returns:
        Columns keys, quantity, value, low, high, worlds; `worlds` is the number of units.

    Raises:
        ValueError: If two rows have the same unit and key.
        InvalidInput: If a unit lacks a key.
    """
    values, columns = unit_table(rows, name, keys, unit)
    if np.isnan(values).any():
        num_missing = int(np.isnan(values).sum())
        raise InvalidInput(
            f"{name}: {num_missing} of {values.size} cells of {unit} x {keys} are missing"
        )
    generator = np.random.default_rng(SEED)
    low, high = bootstrap_interval(values, lambda x: statistic(x, axis=0), generator)
    table = pd.DataFrame(columns, columns=list(keys), dtype=object)
    return table.fillna(np.nan).assign(
        quantity=name, value=statistic(values, axis=0), low=low, high=high, worlds=len(values)
    )


def unit_table(
    rows: pd.DataFrame, name: str, keys: Sequence[str], unit: str
) -> tuple[NDArray[np.float64], list[tuple[Any, ...]]]:
    """Arrange measurements by unit and key, both in the order of their first row.

    Args:
        rows: Measurements.
        name: Column of the values.
        keys: Columns that identify a column of the table; None stands for a value that is missing.
        unit: Column of the repetition.

    Returns:
        (units, keys) values, NaN where there is none, and the keys of each column.

    Raises:
        ValueError: If two rows have the same unit and key: a bug upstream that is not averaged.
    """
    absent = [None] * len(rows)
    key_columns = [
        rows[k].astype(object).where(rows[k].notna(), None).tolist() if k in rows else absent
        for k in keys
    ]
    units: dict[Any, int] = {}
    columns: dict[tuple[Any, ...], int] = {}
    cells: dict[tuple[int, int], float] = {}
    for row_unit, value, *key in zip(rows[unit], rows[name], *key_columns, strict=True):
        column = columns.setdefault(tuple(key), len(columns))
        cell = units.setdefault(row_unit, len(units)), column
        if cell in cells:
            raise ValueError(f"{name}: duplicate measurements of {unit} {row_unit} and {key}")
        cells[cell] = value
    values = np.full((len(units), len(columns)), np.nan)
    values[tuple(np.array(list(cells)).T)] = list(cells.values())
    return values, list(columns)


def slopes(rows: pd.DataFrame, y: str, x: str, keys: Sequence[str]) -> pd.DataFrame:
    """Compute local exponents d log y / d log x between neighbouring x.

    A single slope over the whole range would hide a cross-over.

    Args:
        rows: Measurements.
        y: Column of the dependent quantity.
        x: Column of the independent quantity.
        keys: Columns that identify a curve.

    Returns:
        Columns keys, x and "slope", one row per interval at its larger x.
    """
    parts = []
    for key, group_rows in rows.groupby(list(keys), sort=False):
        group_rows = group_rows.sort_values(x)
        exponents = np.diff(np.log(group_rows[y].to_numpy())) / np.diff(
            np.log(group_rows[x].to_numpy())
        )
        key_columns = dict(zip(keys, key, strict=True))
        parts.append(
            pd.DataFrame({**key_columns, x: group_rows[x].to_numpy()[1:], "slope": exponents})
        )
    return pd.concat(parts, ignore_index=True)
