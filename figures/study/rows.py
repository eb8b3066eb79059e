"""Row selection and line plots of the study's summary tables, shared by its figures."""

from typing import Any

import pandas as pd

from figures import style


def select_rows(
    table: pd.DataFrame, quantity: str, order_column: str, **filters: Any
) -> pd.DataFrame:
    """Select the rows of one quantity whose columns have the given values.

    Args:
        table: A summary table with the column `quantity`.
        quantity: Value of that column.
        order_column: Column to sort by; rows without a value in it are dropped.
        **filters: Values of other columns.

    Returns:
        The selected rows, sorted.
    """
    rows = table[table["quantity"] == quantity]
    for column, value in filters.items():
        rows = rows[rows[column] == value]
    return rows.dropna(subset=[order_column]).sort_values(order_column)


def plot_line(axes: Any, rows: pd.DataFrame, x: str, **options: Any) -> None:
    """Plot `value` against the column `x`, with its interval as a band."""
    style.plot_band(axes, rows[x], rows["value"], rows["low"], rows["high"], **options)
