"""Variance against the horizon, its local exponents, and what was predicted of it."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

COLUMNS = ("quantity", "world", "estimator", "gamma", "horizon", "value", "low", "high")
REDUCED = {
    "plain": "as sampled",
    "position_value": "mean at the position",
    "value": "value baseline",
    "optimal": "optimal baseline",
    "rb_all": "mean costs",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame) -> Figure:
    """Four panels: by discount, by variance reduction, local exponents, without mixing."""
    figure, (discount, reduced, exponent, absorbing) = style.panels(2, 2, 5.4)
    by_discount(discount, table, "mixing")
    bounds(discount, table)
    discount.set_title("One trajectory's noise, mixing chain")
    by_reduction(reduced, table)
    exponents(exponent, table)
    by_discount(absorbing, table, "absorbing")
    absorbing.set_title("Two classes that never mix")
    return figure


def _scales(axes: Any, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set(xlabel="horizon T", ylabel=label)


def by_discount(axes: Any, table: pd.DataFrame, world: str) -> None:
    rows = pick(table, "variance", "horizon", world=world, estimator="plain")
    gammas = sorted(rows["gamma"].unique())
    for gamma, colour in zip(gammas, style.shades(len(gammas)), strict=True):
        where = {"world": world, "estimator": "plain", "gamma": gamma}
        slope = table[table["quantity"] == "last_slope"]
        for column, value in where.items():
            slope = slope[slope[column] == value]
        label = f"γ = {gamma:g}  ($T^{{{slope['value'].iloc[0]:.2f}}}$)"
        line(axes, rows[rows["gamma"] == gamma], "horizon", color=colour, label=label)
    axes.set_yscale("log")
    _scales(axes, "variance of one trajectory, nats²")
    axes.legend(loc="upper left")


def bounds(axes: Any, table: pd.DataFrame) -> None:
    for name, dash, label in (
        ("tight", "--", "tight, $T^3$"),
        ("published", ":", "published, $T^4$"),
    ):
        rows = pick(table, name, "horizon", world="mixing")
        axes.plot(rows["horizon"], rows["value"], dash, color=style.GREY, lw=1, label=label)
    axes.set_ylim(top=1e3 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=2)


def by_reduction(axes: Any, table: pd.DataFrame) -> None:
    for (name, label), colour in zip(REDUCED.items(), style.CYCLE, strict=False):
        rows = pick(table, "variance", "horizon", world="mixing", estimator=name, gamma=1.0)
        line(axes, rows, "horizon", color=colour, label=label)
    axes.set_yscale("log")
    _scales(axes, "variance of one trajectory, nats²")
    axes.set_title("γ = 1 with less noise")
    axes.legend(loc="upper left")


def exponents(axes: Any, table: pd.DataFrame) -> None:
    for (name, label), colour in zip(REDUCED.items(), style.CYCLE, strict=False):
        rows = pick(table, "slope", "horizon", world="mixing", estimator=name, gamma=1.0)
        line(axes, rows, "horizon", color=colour, label=label)
    for gamma, dash in ((0.0, ":"), (0.9, "--")):
        rows = pick(table, "slope", "horizon", world="mixing", estimator="plain", gamma=gamma)
        axes.plot(rows["horizon"], rows["value"], dash, color="black", lw=1, label=f"γ = {gamma:g}")
    _scales(axes, "local exponent")
    axes.set_ylim(0, 3.2)
    axes.set_title("Exponents cross over from 2 to 3")
    axes.legend(loc="lower center", ncols=2, fontsize=6)
