"""Share of the exact gradient's improvement that one step achieves, by discount and batch size."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

COLUMNS = ("quantity", "estimator", "distance", "gamma", "n", "value", "low", "high")
NAMES = {"plain": "as sampled", "rb_all_value": "mean costs, value baseline"}
GAMMAS = (0.0, 0.5, 0.9, 1.0)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the share by batch size for two estimators, and worlds where γ = 0 always wins."""
    figure, (sampled, quiet, never) = style.make_panels(1, 3, 2.9, width=width)
    for axes, name in ((sampled, "plain"), (quiet, "rb_all_value")):
        draw_shares(axes, table, name)
    draw_worlds(never, table)
    sampled.set_ylabel("decrease of J / exact gradient's decrease")
    handles, labels = sampled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(GAMMAS))
    return figure


def draw_shares(axes: Any, table: pd.DataFrame, name: str) -> None:
    """Draw the share against batch size, one line a discount."""
    rows = select_rows(table, "share", "n", estimator=name, distance=0.7)
    for gamma, colour in zip(GAMMAS, style.sequential_colors(len(GAMMAS)), strict=True):
        gamma_rows = rows[rows["gamma"] == gamma]
        plot_line(axes, gamma_rows, "n", color=colour, label=f"γ = {gamma:g}", marker="o", ms=2.5)
    axes.axhline(1, color="black", lw=0.6)
    axes.set(xscale="log", xlabel="trajectories n", ylim=(0, 1.15))
    axes.set_title(NAMES[name].capitalize())


def draw_worlds(axes: Any, table: pd.DataFrame) -> None:
    """Draw the share of worlds where γ = 0 beats γ = 1 at any batch size, by teacher distance."""
    rows = select_rows(table, "never", "distance", estimator="plain")
    spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
    axes.errorbar(
        range(len(rows)), rows["value"], yerr=spread, fmt="o", color=style.BLUE, capsize=3
    )
    axes.set_xticks(range(len(rows)), [f"{x:g}" for x in rows["distance"]])
    axes.set(xlabel="teacher distance", ylabel="share of worlds", ylim=(0, 1))
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_title("γ = 0 beats γ = 1 at any n")
