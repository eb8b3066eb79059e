"""Learning curves of a capacity-limited student under every objective."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

COLUMNS = ("quantity", "objective", "optimizer", "clip", "iteration", "value", "low", "high")
COLOURS = {
    "token": style.SKY,
    "gamma 0.9": style.YELLOW,
    "sequence": style.RED,
    "sequence, leave one out": style.ORANGE,
    "local KL": style.BLUE,
    "sequence, mean costs": style.PURPLE,
    "top 2": style.GREEN,
    "top 2, un-normalised": "black",
    "top 2, sampled tail": style.GREY,
}
PANELS = (
    ("excess", "J / optimum − 1", "Sequence KL"),
    ("teacher_excess", "KL per token / optimum's − 1", "KL on the teacher's prefixes"),
    ("reward_short", "optimum's reward − mean reward", "Reward unseen by both models"),
)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw three panels of curves with Adam, and the final J by optimizer and gradient clipping."""
    figure, (excess, teacher, reward, final) = style.make_panels(2, 2, 5.6, width=width)
    for axes, (quantity, label, title) in zip((excess, teacher, reward), PANELS, strict=True):
        draw_curves(axes, table, quantity, label)
        axes.set_title(title)
    excess.set_yscale("log")
    draw_final(final, table)
    handles, labels = excess.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def draw_curves(axes: Any, table: pd.DataFrame, quantity: str, label: str) -> None:
    """Draw a quantity by iteration, one line an objective."""
    for objective, colour in COLOURS.items():
        filters = {"objective": objective, "optimizer": "adam", "clip": "none"}
        rows = select_rows(table, quantity, "iteration", **filters)
        plot_line(axes, rows, "iteration", color=colour, label=objective)
    axes.set(xlabel="iteration", ylabel=label)


def draw_final(axes: Any, table: pd.DataFrame) -> None:
    """Draw the final J of every objective, by optimizer and clipping."""
    rows = table[table["quantity"] == "final"]
    kinds = [("sgd", "none"), ("sgd", "0.5"), ("adam", "none"), ("adam", "0.5")]
    shift = np.linspace(-0.32, 0.32, len(COLOURS))
    for (objective, colour), offset in zip(COLOURS.items(), shift, strict=True):
        objective_rows = (
            rows[rows["objective"] == objective].set_index(["optimizer", "clip"]).loc[kinds]
        )
        spread = [
            (objective_rows["value"] - objective_rows["low"]).clip(lower=0),
            objective_rows["high"] - objective_rows["value"],
        ]
        axes.errorbar(
            np.arange(4) + offset,
            objective_rows["value"],
            yerr=spread,
            fmt="o",
            ms=3,
            lw=1,
            color=colour,
        )
    names = [f"{name}\n{'unclipped' if clip == 'none' else 'clipped'}" for name, clip in kinds]
    axes.set_xticks(range(4), names)
    axes.set(yscale="log", ylabel="final J / optimum − 1")
    axes.set_title("Final J, equally tuned")
