"""Effect of a top-K support: angle to the full gradient, and drift of the mass on the support."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows
from figures.study.estimators import FORMS, form_name

COLUMNS = ("quantity", "form", "source", "k", "mass", "value", "low", "high")
CAPTION = (
    "Gradients of seven losses on a support S of the teacher's or the student's K most probable "
    "of 64 tokens, compared with the gradient of the full reverse KL: the cosine of the angle "
    "between them, by K and by the student's probability p(S) of the support, and the first-order "
    "change of p(S) in a step of descent per unit of the full gradient's norm. Renormalised: local "
    "support matching, the KL of both models renormalised on S. Un-normalised: Σ p log p/q over S "
    "alone. Published tail: the un-normalised loss plus the sampled token's cost outside S. Means "
    "over random prefixes; panels by p(S) pool all K of the teacher's support. Bands, mostly "
    "narrower than the lines: 95 % bootstrap intervals. Alternating colors: curves that coincide."
)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the cosine by K for both models' supports, and cosine and drift of p(S) by p(S)."""
    column = style.is_column(width)
    if column:  # the student's support and the angle by p(S) repeat what these two say
        figure, (by_size, drift) = style.make_panels(2, 1, 5.2, width=width)
        draw_by_size(by_size, table, "teacher")
    else:
        figure, (teacher, student, angle, drift) = style.make_panels(2, 2, 5.6, width=width)
        draw_by_size(teacher, table, "teacher")
        draw_by_size(student, table, "student")
        draw_by_mass(angle, table, "cosine", "cosine with the full gradient")
        angle.set_ylim(angle.get_ylim()[0] - 0.15, 1.05)
        note(angle, 0.05, "below 0: away from the full gradient")
    draw_by_mass(drift, table, "drift", "change of p(S) under descent")
    drift.margins(y=0.12)
    note(drift, 0.96, "above 0: the support gains mass")
    note(drift, 0.04, "below 0: the support loses mass")
    colors = {form_name(x): color for x, color in rows.FORM_COLORS.items() if x in FORMS}
    figure.legend(
        handles=[
            *rows.legend_lines({f"{form_name('full_reverse_kl')} (drift only)": "black"}),
            *rows.legend_lines(colors, marker="o", ms=2.5),
            rows.band_mark(),
        ],
        loc="outside lower center",
        ncols=2 if column else 5,
    )
    return figure


def note(axes: Any, y: float, text: str) -> None:
    """Say at the right end of a panel what its highest or lowest values mean."""
    place = {"transform": axes.transAxes, "ha": "right", "va": "center"}
    axes.text(0.99, y, text, color="#444444", fontsize=7, **place)


def describe_lowest(curves: list[rows.Curve], words: str, x: str, symbol: str) -> str:
    """Return words and, on a second line, the form and place of the lowest value of all curves."""
    lows = [(c.loc[c["value"].idxmin()], look["label"]) for c, look in curves if len(c)]
    if not lows:
        return words
    row, name = min(lows, key=lambda low: float(low[0]["value"]))
    value = f"{row['value']:.2f}".replace("-", "−")
    return f"{words}: lowest is\n{name}, {value} at {symbol} = {row[x]:.2g}"


def draw_by_size(axes: Any, table: pd.DataFrame, source: str) -> None:
    """Draw the cosine with the full gradient by K, one line a form of the loss."""
    curves = curves_by_form(table, "cosine", "k", source)
    rows.plot_curves(axes, curves, "k")
    sizes = sorted(table["k"].dropna().unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{k:g}" for k in sizes])
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="K (of 64 tokens)", ylabel="cosine with the full gradient", ylim=(-0.5, 1.05))
    note(axes, 0.05, "below 0: away from the full gradient")
    axes.set_title(describe_lowest(curves, f"The {source}'s top K", "k", "K"))


def draw_by_mass(axes: Any, table: pd.DataFrame, quantity: str, label: str) -> None:
    """Draw a quantity by the student's mass on the support, one line a form of the loss."""
    curves = curves_by_form(table, f"{quantity}_by_mass", "mass", "teacher")
    full = rows.select_rows(
        table, f"full_{quantity}_by_mass", "mass", source="teacher", form="renormalised"
    )
    look = {"color": rows.FORM_COLORS["full_reverse_kl"], "label": form_name("full_reverse_kl")}
    rows.plot_curves(axes, [(full, look), *curves], "mass")
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="student's mass on the support, p(S)", ylabel=label, xlim=(0, 1))
    axes.set_title(describe_lowest(curves, f"{quantity.capitalize()} by p(S)", "mass", "p(S)"))


def curves_by_form(table: pd.DataFrame, quantity: str, x: str, source: str) -> list[rows.Curve]:
    """Return the curve of each form of the loss.

    Args:
        table: The table of the figure.
        quantity: Quantity of the curves.
        x: Column of the horizontal coordinate.
        source: Model whose top K is the support.

    Returns:
        The curves, in the order of the legend.
    """
    return [
        (
            rows.select_rows(table, quantity, x, source=source, form=form),
            {"color": color, "label": form_name(form), "marker": "o", "ms": 2.5},
        )
        for form, color in rows.FORM_COLORS.items()
        if form in FORMS
    ]
