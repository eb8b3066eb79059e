"""Learning curves of a capacity-limited student under every objective."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

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
    ("excess", "J over its optimum, minus 1", "Sequence KL"),
    ("teacher_excess", "KL a token over that optimum's, minus 1", "On the teacher's prefixes"),
    ("reward_short", "mean reward below that optimum's", "A reward that neither sees"),
)


def draw(table: pd.DataFrame) -> Figure:
    """Three panels of curves with Adam, and the final J by optimizer and clipping."""
    figure, (excess, teacher, reward, final) = style.panels(2, 2, 5.6)
    for axes, (quantity, label, title) in zip((excess, teacher, reward), PANELS, strict=True):
        curves(axes, table, quantity, label)
        axes.set_title(title)
    excess.set_yscale("log")
    ends(final, table)
    handles, labels = excess.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def curves(axes: Any, table: pd.DataFrame, quantity: str, label: str) -> None:
    for objective, colour in COLOURS.items():
        where = {"objective": objective, "optimizer": "adam", "clip": "none"}
        rows = pick(table, quantity, "iteration", **where)
        line(axes, rows, "iteration", color=colour, label=objective)
    axes.set(xlabel="iteration", ylabel=label)


def ends(axes: Any, table: pd.DataFrame) -> None:
    rows = table[table["quantity"] == "final"]
    kinds = [("sgd", "none"), ("sgd", "0.5"), ("adam", "none"), ("adam", "0.5")]
    shift = np.linspace(-0.32, 0.32, len(COLOURS))
    for (objective, colour), away in zip(COLOURS.items(), shift, strict=True):
        mine = rows[rows["objective"] == objective].set_index(["optimizer", "clip"]).loc[kinds]
        spread = [(mine["value"] - mine["low"]).clip(lower=0), mine["high"] - mine["value"]]
        axes.errorbar(
            np.arange(4) + away, mine["value"], yerr=spread, fmt="o", ms=3, lw=1, color=colour
        )
    names = [f"{name}\n{'unclipped' if clip == 'none' else 'clipped'}" for name, clip in kinds]
    axes.set_xticks(range(4), names)
    axes.set(yscale="log", ylabel="final J over its optimum, minus 1")
    axes.set_title("Tuned alike, at the end")
