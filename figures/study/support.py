"""What a top-K support hides: angle to the full gradient and drift of the mass it covers."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

COLUMNS = ("quantity", "form", "source", "k", "mass", "value", "low", "high")
FORMS = {
    "renormalised": "renormalised (paper's)",
    "and_sampled": "renormalised, with sampled token",
    "unnormalised": "un-normalised",
    "stopped": "stopped head",
    "bucket": "tail bucket",
    "sampled_tail": "sampled tail",
    "published_tail": "published tail",
}


def draw(table: pd.DataFrame) -> Figure:
    """Four panels: cosine by K for both models' supports, cosine and drift of p(S) by p(S)."""
    figure, (teacher, student, angle, drift) = style.panels(2, 2, 5.4)
    by_size(teacher, table, "teacher")
    by_size(student, table, "student")
    by_mass(angle, table, "cosine", "cosine with the full gradient")
    by_mass(drift, table, "drift", "descent's pull on p(S)")
    rows = pick(table, "full_drift_by_mass", "mass", source="teacher", form="renormalised")
    drift.plot(rows["mass"], rows["value"], "--", color="black", lw=1, label="full reverse KL")
    drift.set_title("Which way is p(S) pulled?")
    drift.legend(handles=drift.lines[-1:], loc="upper right")
    angle.set_title("Less mass, more hidden (teacher's top K)")
    student.legend(loc="lower right", fontsize=6)
    return figure


def by_size(axes: Any, table: pd.DataFrame, source: str) -> None:
    for (form, label), colour in zip(FORMS.items(), style.CYCLE, strict=True):
        rows = pick(table, "cosine", "k", source=source, form=form)
        line(axes, rows, "k", color=colour, label=label, marker="o", ms=2.5)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="K of 64 tokens", ylabel="cosine with the full gradient", ylim=(-0.5, 1.05))
    axes.axhline(0, color="black", lw=0.6)
    axes.set_title(f"Support: the {source}'s top K")


def by_mass(axes: Any, table: pd.DataFrame, quantity: str, label: str) -> None:
    for (form, name), colour in zip(FORMS.items(), style.CYCLE, strict=True):
        rows = pick(table, f"{quantity}_by_mass", "mass", source="teacher", form=form)
        line(axes, rows, "mass", color=colour, label=name, marker="o", ms=2.5)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="student's mass on the support, p(S)", ylabel=label, xlim=(0, 1))
