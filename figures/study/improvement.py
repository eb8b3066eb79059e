"""How much of the exact gradient's decrease one step achieves, by discount and batch."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

COLUMNS = ("quantity", "estimator", "distance", "gamma", "n", "value", "low", "high")
NAMES = {"plain": "as sampled", "rb_all_value": "mean costs, value baseline"}
SHOWN = (0.0, 0.5, 0.9, 1.0)


def draw(table: pd.DataFrame) -> Figure:
    """Three panels: share of the decrease against n of two estimators, and worlds by distance."""
    figure, (sampled, quiet, never) = style.panels(1, 3, 2.9)
    for axes, name in ((sampled, "plain"), (quiet, "rb_all_value")):
        shares(axes, table, name)
    worlds(never, table)
    sampled.set_ylabel("decrease of J / the exact gradient's")
    handles, labels = sampled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SHOWN))
    return figure


def shares(axes: Any, table: pd.DataFrame, name: str) -> None:
    rows = pick(table, "share", "n", estimator=name, distance=0.7)
    for gamma, colour in zip(SHOWN, style.shades(len(SHOWN)), strict=True):
        at = rows[rows["gamma"] == gamma]
        line(axes, at, "n", color=colour, label=f"γ = {gamma:g}", marker="o", ms=2.5)
    axes.axhline(1, color="black", lw=0.6)
    axes.set(xscale="log", xlabel="trajectories n", ylim=(0, 1.15))
    axes.set_title(NAMES[name].capitalize())


def worlds(axes: Any, table: pd.DataFrame) -> None:
    rows = pick(table, "never", "distance", estimator="plain")
    spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
    axes.errorbar(
        range(len(rows)), rows["value"], yerr=spread, fmt="o", color=style.BLUE, capsize=3
    )
    axes.set_xticks(range(len(rows)), [f"{x:g}" for x in rows["distance"]])
    axes.set(xlabel="distance of the teacher", ylabel="share of worlds", ylim=(0, 1))
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_title("γ = 0 beats γ = 1 at any n")
