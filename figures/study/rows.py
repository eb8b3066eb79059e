"""Rows of a summary table, picked and drawn; every figure of the study reads one this way."""

from typing import Any

import pandas as pd

from figures import style


def pick(table: pd.DataFrame, quantity: str, by: str, **where: Any) -> pd.DataFrame:
    """Rows of one quantity whose other columns have the given values, in order of `by`."""
    chosen = table[table["quantity"] == quantity]
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    return chosen.dropna(subset=[by]).sort_values(by)


def line(axes: Any, rows: pd.DataFrame, x: str, **how: Any) -> None:
    """Value against x with its interval as a band."""
    style.curve(axes, rows[x], rows["value"], rows["low"], rows["high"], **how)
