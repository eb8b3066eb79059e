"""Training curves of the main methods on one task (the paper's figures A4 and A6)."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import STEP_COLUMNS, seed_means, select_methods, steps_table

COLUMNS = STEP_COLUMNS
CAPTION = (
    "Training on one task: means over seeds with 95 % intervals (Student's t; geometric where the "
    "axis is logarithmic). Held-out accuracy is measured at top-p 1, the rest on fresh rollouts. "
    "The gap is the mean of log q - log p over sampled, supervised tokens; gradient norms are "
    "before clipping at 1; repeated tokens complete an 8-gram that occurred before. Local support "
    "samples its rollouts from the nucleus (top-p 0.9), as in the paper, so its train score and "
    "its gap are about those rollouts. The paper has one seed of 400 steps, responses of up to "
    "16k tokens, and no panel of repetition."
)
METHODS = {
    "sampled": ("sampled token", style.RED, "-"),
    "sampled_mask": ("sampled token, mask", style.RED, "--"),
    "lsm": ("local support", style.BLUE, "-"),
    "lsm_mask": ("local support, mask", style.BLUE, "--"),
}
PANELS = {
    "reward": "Train score",
    "accuracy": "Held-out accuracy",
    "truncated": "Truncated responses",
    "length": "Length, tokens",
    "entropy": "Entropy, nats",
    "grad_norm": "Gradient norm",
    "gap": "Gap, nats",
    "repeated": "Repeated tokens",
}
LOG_COLUMNS, SHARE_COLUMNS = ("entropy", "grad_norm"), ("reward", "accuracy", "truncated")
NUM_PANEL_COLUMNS = 4


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw PANELS for the group "single"."""
    figure, axes = style.make_panels(2, NUM_PANEL_COLUMNS, 3.7, width=width)
    draw_panels(axes, select_methods(table, "single", METHODS))
    add_legend(figure, axes)
    return figure


def draw_panels(axes: list[Any], table: pd.DataFrame) -> None:
    """Draw PANELS for one task."""
    table = table.assign(gap=-table["cost"])
    for ax, (column, title) in zip(axes, PANELS.items(), strict=True):
        for method, (label, colour, dash) in METHODS.items():
            mean = seed_means(table[table["method"] == method], column, column in LOG_COLUMNS)
            if len(mean):
                options = {"color": colour, "ls": dash, "lw": 1.1, "label": label}
                options |= {"marker": "o", "ms": 3} if column == "accuracy" else {}
                style.plot_band(
                    ax, mean["step"], mean["value"], mean["low"], mean["high"], **options
                )
        ax.set_title(title)
        if column in LOG_COLUMNS:
            style.set_log_axis(ax)
        if column in SHARE_COLUMNS:
            ax.set_ylim(-0.03, 1.03)


def add_legend(figure: Figure, axes: list[Any]) -> None:
    """Add the legend below the figure and the label of the x axis to the lowest panels."""
    for ax in axes[-NUM_PANEL_COLUMNS:]:
        ax.set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS))


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps of the runs."""
    return steps_table(runs)
