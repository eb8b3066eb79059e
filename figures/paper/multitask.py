"""Training curves on two tasks that take turns (the paper's figures A5 and A6), by task."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import chosen, steps
from figures.paper.dynamics import COLUMNS as COLUMNS
from figures.paper.dynamics import COLUMNS_OF_PANELS, METHODS, PANELS, all_panels, finish

CAPTION = (
    "Two tasks that take turns, each with its own teacher: chain, whose teacher writes tags and "
    "ends otherwise, and sort, whose teacher writes as the student does. Panels and intervals are"
    " as in the figure of one task. In the paper the second task is ALFWorld, in turns with math."
)


def draw(table: pd.DataFrame) -> Figure:
    """PANELS of each task of the group "multi"."""
    table = chosen(table, "multi", METHODS)
    tasks = sorted(table["task"].unique())
    figure, axes = style.panels(2 * len(tasks), COLUMNS_OF_PANELS, 1.75 * 2 * len(tasks))
    for i, task in enumerate(tasks):
        mine = axes[len(PANELS) * i : len(PANELS) * (i + 1)]
        all_panels(mine, table[table["task"] == task])
        for place in mine[::COLUMNS_OF_PANELS]:
            place.set_ylabel(f"task {task}")
    finish(figure, axes)
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    return steps(runs)
