"""Training curves on two alternating tasks, by task (the paper's figures A5 and A6)."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import select_methods, steps_table
from figures.paper.dynamics import COLUMNS as COLUMNS
from figures.paper.dynamics import METHODS, NUM_PANEL_COLUMNS, PANELS, add_legend, draw_panels

CAPTION = (
    "Two alternating tasks, each with its own teacher: chain, whose teacher uses other tags and "
    "EOS than the student, and sort, whose teacher uses the same. Panels and intervals as in "
    "`dynamics`. In the paper the second task is ALFWorld, alternating with mathematics."
)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw PANELS for each task of the group "multi"."""
    table = select_methods(table, "multi", METHODS)
    tasks = sorted(table["task"].unique())
    figure, axes = style.make_panels(
        2 * len(tasks), NUM_PANEL_COLUMNS, 1.75 * 2 * len(tasks), width=width
    )
    for i, task in enumerate(tasks):
        task_axes = axes[len(PANELS) * i : len(PANELS) * (i + 1)]
        draw_panels(task_axes, table[table["task"] == task])
        for ax in task_axes[::NUM_PANEL_COLUMNS]:
            ax.set_ylabel(f"task {task}")
    add_legend(figure, axes)
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps of the runs."""
    return steps_table(runs)
