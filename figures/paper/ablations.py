"""Ablations of the local support (the paper's figure 6): renormalisation, K and top-p."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import seed_means, select_methods, steps_table
from figures.paper.dynamics import COLUMNS as COLUMNS
from figures.paper.dynamics import set_log_axis

CAPTION = (
    "Ablations of the local support objective without a mask: renormalisation, K (8 unless "
    "stated, of 261 ids), and the nucleus of the rollouts (top-p 0.9 unless stated). Entropy: the "
    "student's on its own rollouts; train score: of these rollouts (across a page); held-out "
    "accuracy: at top-p 1. Means over seeds with 95 % intervals (Student's t). The score of a run "
    "is measured on rollouts from its own nucleus: a smaller nucleus scores higher with the same "
    "student. The paper uses K of 16, 32 and 48 of 152k ids, shows one of the two scores per "
    "panel, and trains for 400 steps."
)
ROWS = {
    "entropy": "entropy, nats",
    "reward": "train score",
    "accuracy": "held-out accuracy",
}
PANELS = {
    "Renormalisation": {"lsm": "renormalised", "lsm_unnormalised": "not renormalised"},
    "Size of the support": {"lsm_k2": "K = 2", "lsm_k4": "K = 4", "lsm": "K = 8"},
    "Nucleus of the rollouts": {
        "lsm_whole": "top-p 1",
        "lsm": "top-p 0.9",
        "lsm_top_p_0.8": "top-p 0.8",
    },
}
DASHES = ("-", "--", "-.")
"""Of the methods of a panel, so that a curve under another one is seen."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one column an ablation and one row a quantity; in one column of a page vice versa.

    One column leaves out the train score: it is of each run's own nucleus, and the accuracy is not.
    """
    methods = {method for labels in PANELS.values() for method in labels}
    table = select_methods(table, "single", methods)
    if style.is_column(width):
        return draw_column(table, width)
    figure, axes = style.make_panels(len(ROWS), len(PANELS), 5.2, width=width)
    for i, (title, labels) in enumerate(PANELS.items()):
        panels = axes[i :: len(PANELS)]
        for ax, column in zip(panels, ROWS, strict=True):
            draw_panel(ax, table, column, labels)
        panels[0].set_title(title)
        panels[-1].set_xlabel("step")
        handles, names = panels[0].get_legend_handles_labels()
        options = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.32), "ncols": 2}
        panels[-1].legend(handles, names, **options)
    for ax, label in zip(axes[:: len(PANELS)], ROWS.values(), strict=True):
        ax.set_ylabel(label)
    return figure


def draw_column(table: pd.DataFrame, width: float) -> Figure:
    """Draw one row an ablation, with its legend below, and one column a quantity but the score."""
    columns = [column for column in ROWS if column != "reward"]
    figure = Figure(figsize=(width, 6.0), layout="constrained")
    parts: Any = figure.subfigures(len(PANELS), 1)
    for part, (title, labels) in zip(parts, PANELS.items(), strict=True):
        axes = part.subplots(1, len(columns))
        for ax, column in zip(axes, columns, strict=True):
            draw_panel(ax, table, column, labels)
            ax.set(ylabel=ROWS[column], xlabel="step")
        axes[0].set_title(title)
        handles, names = axes[0].get_legend_handles_labels()
        part.legend(handles, names, loc="outside lower center", ncols=len(labels))
    return figure


def draw_panel(axes: Any, table: pd.DataFrame, column: str, labels: dict[str, str]) -> None:
    """Draw a quantity of the methods of one ablation."""
    colours = (style.BLUE, style.RED) if len(labels) == 2 else style.sequential_colors(len(labels))
    for (method, label), colour, dash in zip(labels.items(), colours, DASHES, strict=False):
        mean = seed_means(table[table["method"] == method], column, column == "entropy")
        if len(mean):
            band = (mean["step"], mean["value"], mean["low"], mean["high"])
            options: dict[str, Any] = {"marker": "o", "ms": 3} if column == "accuracy" else {}
            style.plot_band(axes, *band, color=colour, ls=dash, label=label, **options)
    if column == "entropy":
        set_log_axis(axes)
    else:
        axes.set(ylim=(-0.02, 1.02), yticks=(0, 0.5, 1))
        axes.yaxis.set_major_formatter("{x:g}")


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps of the runs."""
    return steps_table(runs)
