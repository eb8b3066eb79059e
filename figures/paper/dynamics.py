"""Training curves of the main methods on one task (the paper's figures A4 and A6)."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import STEP_COLUMNS, seed_means, select_methods, steps_table
from figures.labels import method_label

COLUMNS = STEP_COLUMNS
CAPTION = (
    "Training on one task: means over seeds with 95 % intervals (Student's t; geometric where the "
    "axis is logarithmic). Dashed: with a mask, which leaves tags and EOS out of the loss. Local "
    "support (V1) is the renormalised reverse KL on the teacher's top K. Held-out accuracy is "
    "measured at top-p 1, the rest on fresh rollouts. log q - log p is the mean over sampled, "
    "supervised tokens; gradient norms are before clipping at 1; repeated tokens complete an "
    "8-gram that occurred before. Local support samples its rollouts from the nucleus (top-p "
    "0.9), as in the paper, so its train score and its gap are about those rollouts. The paper "
    "has one seed of 400 steps, responses of up to 16k tokens, and no panel of repetition."
)
METHODS = {
    "sampled": (style.RED, "-"),
    "sampled_mask": (style.RED, "--"),
    "lsm": (style.BLUE, "-"),
    "lsm_mask": (style.BLUE, "--"),
}
PANELS = {
    "reward": "Train score",
    "accuracy": "Held-out accuracy",
    "truncated": "Truncated, share",
    "length": "Length, tokens",
    "entropy": "Entropy, nats",
    "grad_norm": "Gradient norm",
    "gap": "log q − log p, nats",
    "repeated": "Repeated, share",
}
LOG_COLUMNS, SHARE_COLUMNS = ("entropy", "grad_norm"), ("reward", "accuracy", "truncated")


BAND_ALPHA = 0.12
"""Opacity of the intervals: low, since those of three methods often coincide."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw PANELS for the group "single"."""
    if style.is_column(width):
        num_columns, figure_height = 2, 5.9
    else:
        num_columns, figure_height = 4, 3.7
    num_rows = len(PANELS) // num_columns
    figure, axes = style.make_panels(num_rows, num_columns, figure_height, width=width)
    draw_panels(axes, select_methods(table, "single", METHODS))
    add_legend(figure, axes, num_columns)
    return figure


def draw_panels(
    axes: list[Any], table: pd.DataFrame, columns: tuple[str, ...] = tuple(PANELS)
) -> None:
    """Draw the panels of these columns for one task."""
    table = table.assign(gap=-table["cost"])
    for ax, column in zip(axes, columns, strict=True):
        for method, (colour, dash) in METHODS.items():
            mean = seed_means(table[table["method"] == method], column, column in LOG_COLUMNS)
            if len(mean):
                options: dict[str, Any] = {
                    "color": colour,
                    "ls": dash,
                    "lw": 1.1,
                    "label": method_label(method),
                }
                options |= {"marker": "o", "ms": 3} if column == "accuracy" else {}
                options["zorder"] = 3 if dash == "--" else 2
                band = (mean["step"], mean["value"], mean["low"], mean["high"])
                style.plot_band(ax, *band, **options)
                ax.collections[-1].set_alpha(BAND_ALPHA)
        ax.set_title(PANELS[column])
        if column in LOG_COLUMNS:
            set_log_axis(ax)
        if column in SHARE_COLUMNS:
            ax.set(ylim=(-0.03, 1.03), yticks=(0, 0.5, 1))
            ax.yaxis.set_major_formatter("{x:g}")


def set_log_axis(axes: Any) -> None:
    """Make the y axis logarithmic, with ticks at 1, 3 or 1, 2, 5 of a decade where it is short."""
    style.set_log_axis(axes)
    low, high = axes.get_ylim()
    parts = (1, 2, 3, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 30 else (1, 3)
    if high / low < 300:
        ticks = [part * 10.0**power for power in range(-9, 9) for part in parts]
        axes.set_yticks([x for x in ticks if low <= x <= high])
        axes.yaxis.set_major_formatter("{x:g}")


def add_legend(figure: Figure, axes: list[Any], num_columns: int) -> None:
    """Add the legend below the figure and the label of the x axis to the lowest panels."""
    for ax in axes[-num_columns:]:
        ax.set_xlabel("step")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps of the runs."""
    return steps_table(runs)
