"""The discount with the smallest error by batch size, and when later costs are worth including."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

COLUMNS = ("quantity", "estimator", "distance", "n", "value", "low", "high")
NAMES = {
    "plain": "as sampled",
    "leave_one_out": "leave one out of 8",
    "value": "value baseline",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the best discount by estimator and by teacher distance, and the crossover batch size."""
    figure, (estimator, distance, overtaking) = style.make_panels(1, 3, 3.0, width=width)
    draw_by_estimator(estimator, table)
    draw_by_distance(distance, table)
    draw_crossover(overtaking, table)
    distance.legend(loc="lower right")
    handles, labels = estimator.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _label_axes(axes: Any, title: str) -> None:
    """Set title, labels and limits of a panel of best discounts."""
    axes.set(xscale="log", xlabel="trajectories n", ylabel="best discount γ")
    axes.set_ylim(-0.04, 1.04)
    axes.set_title(title)


def draw_by_estimator(axes: Any, table: pd.DataFrame) -> None:
    """Draw the best discount against batch size, one line an estimator."""
    for (name, label), colour in zip(NAMES.items(), style.CYCLE, strict=False):
        rows = select_rows(table, "best_gamma", "n", estimator=name, distance=1.0)
        plot_line(axes, rows, "n", color=colour, label=label, marker="o", ms=2.5)
    _label_axes(axes, "By variance reduction")


def draw_by_distance(axes: Any, table: pd.DataFrame) -> None:
    """Draw the best discount against batch size, one line a distance of the teacher."""
    rows = select_rows(table, "best_gamma", "n", estimator="plain")
    distances = sorted(rows["distance"].unique())
    for distance, colour in zip(distances, style.sequential_colors(len(distances)), strict=True):
        label = f"{distance:g}"
        distance_rows = rows[rows["distance"] == distance]
        plot_line(axes, distance_rows, "n", color=colour, label=label, marker="o", ms=2.5)
    _label_axes(axes, "By teacher distance")


def draw_crossover(axes: Any, table: pd.DataFrame) -> None:
    """Draw the batch size from which γ = 1 has a smaller error than γ = 0, by teacher distance."""
    for (name, label), colour in zip(NAMES.items(), style.CYCLE, strict=False):
        rows = select_rows(table, "overtaking_batch", "distance", estimator=name)
        plot_line(axes, rows, "distance", color=colour, label=label, marker="o", ms=2.5)
    axes.set(xscale="log", yscale="log", xlabel="teacher distance")
    axes.set_ylabel("n from which γ = 1 beats γ = 0")
    axes.set_title("Crossover batch size")
