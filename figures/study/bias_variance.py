"""Effect of the discount on bias, variance and error in the synthetic study."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line

COLUMNS = ("quantity", "estimator", "horizon", "gamma", "n", "value", "low", "high")
NAMES = {
    "plain": "as sampled",
    "value": "value baseline",
    "rb_future": "mean later costs",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw variance by horizon, bias by discount, error by batch size, and the best discount."""
    figure, (variance, bias, error, best) = style.make_panels(2, 2, 5.2, width=width)
    draw_variance(variance, table)
    draw_bias(bias, table)
    draw_error(error, table)
    draw_best(best, table)
    return figure


def select_rows(table: pd.DataFrame, quantity: str, **filters: Any) -> pd.DataFrame:
    """Select the rows of one quantity whose columns have the given values.

    Args:
        table: A summary table.
        quantity: Value of the column `quantity`.
        **filters: Values of other columns.

    Returns:
        The selected rows, sorted by horizon, discount and batch size.
    """
    rows = table[table["quantity"] == quantity]
    for column, value in filters.items():
        rows = rows[rows[column] == value]
    return rows.sort_values(["horizon", "gamma", "n"])


def draw_variance(axes: Any, table: pd.DataFrame) -> None:
    """Draw the total variance of one trajectory's gradient by horizon, with both bounds."""
    plain = select_rows(table, "variance", estimator="plain")
    gammas = [g for g in (0.0, 0.5, 0.9, 0.98, 1.0) if g in set(plain["gamma"])]
    for gamma, colour in zip(gammas, style.sequential_colors(len(gammas)), strict=True):
        slope = select_rows(table, "exponent", estimator="plain", gamma=gamma)["value"].iloc[0]
        label = f"γ = {gamma:g}  ($T^{{{slope:.1f}}}$)"
        plot_line(axes, plain[plain["gamma"] == gamma], "horizon", color=colour, label=label)
    for name, label, dash in (
        ("bound_tight", "tight bound", "--"),
        ("bound_quartic", "published bound, $T^4$", ":"),
    ):
        rows = select_rows(table, name, gamma=1.0)
        axes.plot(rows["horizon"], rows["value"], dash, color=style.GREY, lw=1, label=label)
    axes.set(yscale="log", xlabel="horizon T", ylabel="variance of one trajectory, nats²")
    axes.set_xscale("log", base=2)
    axes.set_title("Variance by horizon")
    axes.set_ylim(top=1e4 * axes.get_ylim()[1])  # space for the legend
    axes.legend(ncols=2, loc="upper left")


def draw_bias(axes: Any, table: pd.DataFrame) -> None:
    """Draw squared bias against the discount, one line a horizon."""
    rows = select_rows(table, "bias2", estimator="plain")
    horizons = sorted(rows["horizon"].unique())
    for horizon, colour in zip(horizons, style.sequential_colors(len(horizons)), strict=True):
        horizon_rows = rows[rows["horizon"] == horizon]
        plot_line(axes, horizon_rows, "gamma", color=colour, label=f"T = {horizon:g}")
    axes.set(xlabel="discount γ", ylabel="squared bias / ‖∇J‖²")
    axes.set_ylim(bottom=0)
    axes.set_title("Bias by discount")
    axes.legend(ncols=2)


def draw_error(axes: Any, table: pd.DataFrame) -> None:
    """Draw mean squared error against batch size at the longest horizon, with the crossover."""
    rows = select_rows(table, "mse", estimator="plain")
    gammas = [g for g in (0.0, 0.5, 0.9, 1.0) if g in set(rows["gamma"])]
    for gamma, colour in zip(gammas, style.sequential_colors(len(gammas)), strict=True):
        plot_line(axes, rows[rows["gamma"] == gamma], "n", color=colour, label=f"γ = {gamma:g}")
    cross = select_rows(table, "overtaking_batch", estimator="plain")
    if len(cross) and np.isfinite(cross["value"].iloc[0]):
        n = cross["value"].iloc[0]
        axes.axvline(n, color=style.GREY, lw=1, ls="--")
        late = n > float(rows["n"].max()) ** 0.5
        axes.annotate(
            f"γ = 1 beats γ = 0\nfrom n ≈ {n:,.0f}",
            (n, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            va="top",
            fontsize=7,
            color="#444444",
        )
    longest = int(rows["horizon"].max())
    axes.set(
        xscale="log", yscale="log", xlabel="trajectories n", ylabel="mean squared error / ‖∇J‖²"
    )
    axes.set_title(f"Error by batch size (T = {longest})")
    axes.legend(loc="lower left")


def draw_best(axes: Any, table: pd.DataFrame) -> None:
    """Draw the discount with the smallest error against batch size, one line an estimator."""
    rows = select_rows(table, "best_gamma")
    for (name, label), colour in zip(NAMES.items(), style.CYCLE, strict=False):
        estimator_rows = rows[rows["estimator"] == name]
        plot_line(axes, estimator_rows, "n", color=colour, label=label, marker="o", ms=2.5)
    axes.set(xscale="log", xlabel="trajectories n", ylabel="best discount γ", ylim=(-0.04, 1.04))
    axes.set_title("Best discount by estimator")
    axes.legend(loc="lower right")
