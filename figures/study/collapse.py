"""Gradient descent on free logits: student mass on the teacher's top K, reverse KL and entropy."""

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows
from figures.study.estimators import form_name

COLUMNS = ("quantity", "objective", "start", "k", "iteration", "value", "low", "high")
CAPTION = (
    "Gradient descent on the expected loss of seven objectives, from a student that equals its "
    "teacher and from one far from it. S holds the teacher's K = 4 most probable of 32 tokens; "
    "p(S) and q(S) are the student's and the teacher's probability of S. Un-normalised: the loss "
    "Σ p log p/q over S alone, whose minimum has p(S) = q(S)/e. Renormalised: local support "
    "matching, the KL of both models renormalised on S, which does not see p(S). Published tail: "
    "the un-normalised loss plus the sampled token's cost outside S; the sampled tail adds that "
    "cost to the head with its gradient stopped. Means over random prefixes; alternating colors: "
    "curves that coincide. Bars at the right: 95 % bootstrap intervals at the last iteration."
)
OBJECTIVES = {
    "full_reverse_kl": "full_reverse_kl",
    "teacher_topk_sampled_tail": "sampled_tail",
    "teacher_topk_bucket": "bucket",
    "teacher_topk_stopped": "stopped",
    "teacher_topk": "renormalised",
    "teacher_topk_published_tail": "published_tail",
    "teacher_topk_unnormalised": "unnormalised",
}
"""Form of the loss of each objective."""
K = 4
STARTS = {"teacher": "Student starts at the teacher", "afar": "Student starts far from the teacher"}
OPTIMUM = (
    ("kl", "reverse KL to the teacher (nats)", "its KL should stay 0"),
    ("entropy", "student's entropy (nats)", "its entropy should not change"),
)
"""Quantity, label and title of the panels of a student that starts at the optimum."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw p(S) from an equal and from a distant student; KL and entropy from the equal one."""
    if style.is_column(width):  # the claim is about p(S)
        figure, panels = style.make_panels(2, 1, 5.0, width=width)
    else:
        figure, panels = style.make_panels(2, 2, 5.6, width=width)
    for axes, start in zip(panels, STARTS, strict=False):
        draw_mass(axes, table, start)
    for axes, (quantity, label, title) in zip(panels[2:], OPTIMUM, strict=False):
        draw_curves(axes, table, quantity, "teacher")
        axes.set_ylabel(label)
        axes.set_title(f"{STARTS['teacher']}:\n{title}")
    colors = {form_name(form): rows.FORM_COLORS[form] for form in OBJECTIVES.values()}
    handles = [*rows.legend_lines(colors), rows.interval_mark("95 % interval at the end")]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2 if style.is_column(width) else 4
    )
    return figure


def draw_mass(axes: Any, table: pd.DataFrame, start: str) -> None:
    """Draw the student's mass on the support by iteration, with q(S) and q(S)/e."""
    draw_curves(axes, table, "mass", start)
    first = rows.select_rows(
        table, "mass", "iteration", objective="teacher_topk", start="teacher", k=K
    )
    teacher = float(first["value"].iloc[0])
    for value, label in ((teacher, "q(S)"), (teacher / math.e, "q(S)/e")):
        axes.axhline(value, color=style.GREY, lw=0.8, ls=":", zorder=1)
        axes.text(
            1.0, value, f" {label}", va="center", fontsize=7, transform=axes.get_yaxis_transform()
        )
    axes.set(ylim=(0, 1), ylabel="student's mass on S, p(S)")
    axes.set_title(f"{STARTS[start]}:\n{describe_mass(table, start)}")


def describe_mass(table: pd.DataFrame, start: str) -> str:
    """Return in words where a loss leaves p(S), if it is not where the teacher has it."""
    ends = table[(table["start"] == start) & (table["k"] == K)].set_index(["quantity", "objective"])
    collapsed = ends["value"].get(("mass_over_fixed_point", "teacher_topk_unnormalised"), math.nan)
    renormalised = ends["value"].get(("mass_over_teacher", "teacher_topk"), math.nan)
    if renormalised < 0.9:
        return f"renormalised ends at {renormalised:.2f} q(S)"
    if abs(collapsed - 1) < 0.05:
        return "un-normalised ends at q(S)/e"
    return "mass on the support"


def draw_curves(axes: Any, table: pd.DataFrame, quantity: str, start: str) -> None:
    """Draw a quantity by iteration, one line an objective, with the intervals of its end."""
    curves = [
        (
            rows.select_rows(table, quantity, "iteration", objective=name, start=start, k=K),
            {"color": rows.FORM_COLORS[form], "label": form_name(form)},
        )
        for name, form in OBJECTIVES.items()
    ]
    axes.set_xscale("symlog", linthresh=1)
    rows.plot_curves(axes, curves, "iteration", bands=False)
    rows.plot_end_intervals(axes, curves, "iteration")
    axes.set_xlabel("iteration")
