"""The discount of least error against batch size, and when the whole future pays."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

COLUMNS = ("quantity", "estimator", "distance", "n", "value", "low", "high")
NAMES = {
    "plain": "as sampled",
    "leave_one_out": "leave one out of 8",
    "value": "value baseline",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame) -> Figure:
    """Three panels: best discount by estimator, by teacher distance, and the overtaking batch."""
    figure, (estimator, distance, overtaking) = style.panels(1, 3, 3.0)
    best(estimator, table)
    nearer(distance, table)
    overtakes(overtaking, table)
    distance.legend(loc="lower right")
    handles, labels = estimator.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _axes(axes: Any, title: str) -> None:
    axes.set(xscale="log", xlabel="trajectories n", ylabel="discount of least error")
    axes.set_ylim(-0.04, 1.04)
    axes.set_title(title)


def best(axes: Any, table: pd.DataFrame) -> None:
    for (name, label), colour in zip(NAMES.items(), style.CYCLE, strict=False):
        rows = pick(table, "best_gamma", "n", estimator=name, distance=1.0)
        line(axes, rows, "n", color=colour, label=label, marker="o", ms=2.5)
    _axes(axes, "By variance reduction")


def nearer(axes: Any, table: pd.DataFrame) -> None:
    rows = pick(table, "best_gamma", "n", estimator="plain")
    distances = sorted(rows["distance"].unique())
    for distance, colour in zip(distances, style.shades(len(distances)), strict=True):
        label = f"{distance:g}"
        at = rows[rows["distance"] == distance]
        line(axes, at, "n", color=colour, label=label, marker="o", ms=2.5)
    _axes(axes, "By distance of the teacher")


def overtakes(axes: Any, table: pd.DataFrame) -> None:
    for (name, label), colour in zip(NAMES.items(), style.CYCLE, strict=False):
        rows = pick(table, "overtaking_batch", "distance", estimator=name)
        line(axes, rows, "distance", color=colour, label=label, marker="o", ms=2.5)
    axes.set(xscale="log", yscale="log", xlabel="distance of the teacher")
    axes.set_ylabel("n from which γ = 1 beats γ = 0")
    axes.set_title("When the future pays")
