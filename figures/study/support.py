"""Effect of a top-K support: angle to the full gradient, and drift of the mass on the support."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

COLUMNS = ("quantity", "form", "source", "k", "mass", "value", "low", "high")
FORMS = {
    "renormalised": "renormalised (paper's)",
    "and_sampled": "renormalised, with sampled token",
    "unnormalised": "un-normalised",
    "stopped": "stop-gradient head",
    "bucket": "tail bucket",
    "sampled_tail": "sampled tail",
    "published_tail": "published tail",
}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the cosine by K for both models' supports, and cosine and drift of p(S) by p(S)."""
    figure, (teacher, student, angle, drift) = style.make_panels(2, 2, 5.4, width=width)
    draw_by_size(teacher, table, "teacher")
    draw_by_size(student, table, "student")
    draw_by_mass(angle, table, "cosine", "cosine with the full gradient")
    draw_by_mass(drift, table, "drift", "drift of p(S) under descent")
    rows = select_rows(table, "full_drift_by_mass", "mass", source="teacher", form="renormalised")
    drift.plot(rows["mass"], rows["value"], "--", color="black", lw=1, label="full reverse KL")
    drift.set_title("Drift of p(S)")
    drift.legend(handles=drift.lines[-1:], loc="upper right")
    angle.set_title("Cosine by mass (teacher's top K)")
    student.legend(loc="lower right", fontsize=6)
    return figure


def draw_by_size(axes: Any, table: pd.DataFrame, source: str) -> None:
    """Draw the cosine with the full gradient by K, one line a form of the loss."""
    for (form, label), colour in zip(FORMS.items(), style.CYCLE, strict=True):
        rows = select_rows(table, "cosine", "k", source=source, form=form)
        plot_line(axes, rows, "k", color=colour, label=label, marker="o", ms=2.5)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="K of 64 tokens", ylabel="cosine with the full gradient", ylim=(-0.5, 1.05))
    axes.axhline(0, color="black", lw=0.6)
    axes.set_title(f"Support: the {source}'s top K")


def draw_by_mass(axes: Any, table: pd.DataFrame, quantity: str, label: str) -> None:
    """Draw a quantity by the student's mass on the support, one line a form of the loss."""
    for (form, name), colour in zip(FORMS.items(), style.CYCLE, strict=True):
        rows = select_rows(table, f"{quantity}_by_mass", "mass", source="teacher", form=form)
        plot_line(axes, rows, "mass", color=colour, label=name, marker="o", ms=2.5)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="student's mass on the support, p(S)", ylabel=label, xlim=(0, 1))
