"""Gradient variance against the horizon, its local exponents, and the published bounds."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

COLUMNS = ("quantity", "world", "estimator", "gamma", "horizon", "value", "low", "high")
REDUCED = {
    "plain": "as sampled",
    "position_value": "mean at the position",
    "value": "value baseline",
    "optimal": "optimal baseline",
    "rb_all": "mean costs",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw variance by discount and variance reduction, exponents, and a chain without mixing."""
    figure, (discount, reduced, exponent, absorbing) = style.make_panels(2, 2, 5.4, width=width)
    draw_by_discount(discount, table, "mixing")
    draw_bounds(discount, table)
    discount.set_title("Variance by discount, mixing chain")
    draw_by_reduction(reduced, table)
    draw_exponents(exponent, table)
    draw_by_discount(absorbing, table, "absorbing")
    absorbing.set_title("Variance, two classes without mixing")
    return figure


def _label_axes(axes: Any, label: str) -> None:
    """Set the scale and labels of a panel against the horizon."""
    axes.set_xscale("log", base=2)
    axes.set(xlabel="horizon T", ylabel=label)


def draw_by_discount(axes: Any, table: pd.DataFrame, world: str) -> None:
    """Draw the variance of one trajectory against the horizon, one line a discount."""
    rows = select_rows(table, "variance", "horizon", world=world, estimator="plain")
    gammas = sorted(rows["gamma"].unique())
    for gamma, colour in zip(gammas, style.sequential_colors(len(gammas)), strict=True):
        filters = {"world": world, "estimator": "plain", "gamma": gamma}
        slope = table[table["quantity"] == "last_slope"]
        for column, value in filters.items():
            slope = slope[slope[column] == value]
        label = f"γ = {gamma:g}  ($T^{{{slope['value'].iloc[0]:.2f}}}$)"
        plot_line(axes, rows[rows["gamma"] == gamma], "horizon", color=colour, label=label)
    axes.set_yscale("log")
    _label_axes(axes, "variance of one trajectory, nats²")
    axes.legend(loc="upper left")


def draw_bounds(axes: Any, table: pd.DataFrame) -> None:
    """Draw the tight and the published bound."""
    for name, dash, label in (
        ("tight", "--", "tight, $T^3$"),
        ("published", ":", "published, $T^4$"),
    ):
        rows = select_rows(table, name, "horizon", world="mixing")
        axes.plot(rows["horizon"], rows["value"], dash, color=style.GREY, lw=1, label=label)
    axes.set_ylim(top=1e3 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=2)


def draw_by_reduction(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance at γ = 1 against the horizon, one line a variance reduction."""
    for (name, label), colour in zip(REDUCED.items(), style.CYCLE, strict=False):
        rows = select_rows(table, "variance", "horizon", world="mixing", estimator=name, gamma=1.0)
        plot_line(axes, rows, "horizon", color=colour, label=label)
    axes.set_yscale("log")
    _label_axes(axes, "variance of one trajectory, nats²")
    axes.set_title("Variance reduction at γ = 1")
    axes.legend(loc="upper left")


def draw_exponents(axes: Any, table: pd.DataFrame) -> None:
    """Draw the local exponent of the variance against the horizon."""
    for (name, label), colour in zip(REDUCED.items(), style.CYCLE, strict=False):
        rows = select_rows(table, "slope", "horizon", world="mixing", estimator=name, gamma=1.0)
        plot_line(axes, rows, "horizon", color=colour, label=label)
    for gamma, dash in ((0.0, ":"), (0.9, "--")):
        rows = select_rows(
            table, "slope", "horizon", world="mixing", estimator="plain", gamma=gamma
        )
        axes.plot(rows["horizon"], rows["value"], dash, color="black", lw=1, label=f"γ = {gamma:g}")
    _label_axes(axes, "local exponent")
    axes.set_ylim(0, 3.2)
    axes.set_title("Local exponents of the variance")
    axes.legend(loc="lower center", ncols=2, fontsize=6)
