"""How soon the un-normalised top-K collapses, by the teacher's mass outside the support."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.estimators import estimator_name
from figures.study.rows import plot_line, select_rows

COLUMNS = ("quantity", "objective", "tail", "iteration", "value", "low", "high")
CAPTION = (
    "Gradient descent on free logits from a student that equals its teacher, on a support S of the "
    "teacher's 4 most probable of 32 tokens. First panel: the student's mass on S over the "
    "teacher's, for un-normalised top-K, one line a mass 1 − q(S) that S leaves out; the fixed "
    "point is 1/e in every case. Second panel: iterations until half of the way there, by that "
    "mass, for supports of either model, with a line of slope −1. Renormalised top-K, a "
    "stop-gradient head, a tail bucket and a sampled tail do not move and have no point. Means and "
    "medians over prefixes with 95 % intervals."
)
COLLAPSING: dict[str, dict[str, Any]] = {
    "teacher_topk_unnormalised": {"color": style.RED, "ls": "-"},
    "student_topk_unnormalised": {"color": "black", "ls": (0, (2, 4))},
}
"""Forms that fall to q(S)/e -> how they are drawn; from the teacher itself they coincide."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw p(S)/q(S) by iteration and tail, and the time of half a collapse by tail."""
    narrow = style.is_column(width)
    grid = (2, 1, 4.6) if narrow else (1, 2, 2.9)
    figure, (masses, times) = style.make_panels(*grid, width=width)
    draw_masses(masses, table)
    draw_times(times, table)
    return figure


def draw_masses(axes: Any, table: pd.DataFrame) -> None:
    """Draw p(S)/q(S) of the un-normalised form by iteration, one line a tail."""
    objective = "teacher_topk_unnormalised"
    rows = select_rows(table, "mass_ratio", "iteration", objective=objective)
    tails = sorted(rows["tail"].unique(), reverse=True)
    for tail, colour in zip(tails, style.sequential_colors(len(tails)), strict=True):
        plot_line(axes, rows[rows["tail"] == tail], "iteration", color=colour, label=f"{tail:g}")
    axes.axhline(1 / 2.718281828, color="black", lw=0.8, ls=":")
    axes.text(0, 0.38, "1/e", va="bottom", fontsize=style.MIN_FONT_SIZE)
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="iteration", ylabel="p(S) / q(S)", ylim=(0.3, 1.03))
    axes.set_xlim(-0.1, rows["iteration"].max())
    axes.set_title("Un-normalised top-K falls to 1/e")
    axes.legend(title="1 − q(S)", loc="lower left", bbox_to_anchor=(0.0, 0.18))


def draw_times(axes: Any, table: pd.DataFrame) -> None:
    """Draw the iterations until half of the collapse by tail, one line a form."""
    for objective, line_style in COLLAPSING.items():
        rows = select_rows(table, "half_time", "tail", objective=objective)
        if len(rows):
            label = estimator_name(objective)
            plot_line(axes, rows, "tail", label=label, marker="o", ms=3, **line_style)
    rows = select_rows(table, "half_time", "tail", objective="teacher_topk_unnormalised")
    if len(rows):
        last = rows.iloc[-1]
        line = last["value"] * last["tail"] / rows["tail"]
        axes.plot(rows["tail"], line, ":", color=style.GREY, lw=1, label="slope −1")
    axes.set(xscale="log", yscale="log", xlabel="mass outside the support, 1 − q(S)")
    axes.set_ylabel("iterations to half of the collapse")
    axes.set_title("The less S leaves out, the later")
    axes.legend(loc="lower left")
