"""Training curves on two alternating tasks, by task (the paper's figures A5 and A6)."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import select_methods, steps_table
from figures.paper.dynamics import COLUMNS as COLUMNS
from figures.paper.dynamics import METHODS, PANELS, add_legend, draw_panels

CAPTION = (
    "Two alternating tasks, each with its own teacher: chain, whose teacher uses other tags and "
    "EOS than the student, and sort, whose teacher uses the same. Steps are those of both tasks "
    "together. Means over seeds with 95 % intervals; panels as in `dynamics`, on the same axes "
    "for both tasks, in one column of a page the four with the paper's claims. In the paper the "
    "second task is ALFWorld, alternating with mathematics."
)
COLUMN_PANELS = ("accuracy", "truncated", "grad_norm", "gap")
"""Panels in one column: accuracy, the failure, and the two quantities with claims for both."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw PANELS for each task of the group "multi"; in one column COLUMN_PANELS, side by side."""
    table = select_methods(table, "multi", METHODS)
    tasks = sorted(table["task"].unique())
    if style.is_column(width):
        return draw_column(table, tasks, width)
    num_columns = len(PANELS) // 2
    figure, axes = style.make_panels(2 * len(tasks), num_columns, 3.5 * len(tasks), width=width)
    for i, task in enumerate(tasks):
        task_axes = axes[len(PANELS) * i : len(PANELS) * (i + 1)]
        for ax, first in zip(task_axes, axes[: len(PANELS) * (i > 0)], strict=False):
            ax.sharey(first)
        draw_panels(task_axes, table[table["task"] == task])
        for ax in task_axes[::num_columns]:
            ax.set_ylabel(f"task {task}")
    add_legend(figure, axes, num_columns)
    return figure


def draw_column(table: pd.DataFrame, tasks: list[str], width: float) -> Figure:
    """Draw one row a quantity and one column a task, the rows with the same axis."""
    figure = Figure(figsize=(width, 6.2), layout="constrained")
    axes = list(figure.subplots(len(COLUMN_PANELS), len(tasks), sharey="row", squeeze=False).flat)
    for i, task in enumerate(tasks):
        task_axes = axes[i :: len(tasks)]
        draw_panels(task_axes, table[table["task"] == task], COLUMN_PANELS)
        task_axes[0].set_title(f"Task {task}\n{PANELS[COLUMN_PANELS[0]]}")
    add_legend(figure, axes, len(tasks))
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps of the runs."""
    return steps_table(runs)
