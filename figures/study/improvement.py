"""Share of the exact gradient's improvement that one step achieves, by discount and batch size."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows
from figures.study.estimators import estimator_title

COLUMNS = ("quantity", "estimator", "distance", "gamma", "n", "value", "low", "high")
CAPTION = (
    "Decrease of the sequence KL J by one step at its best step size along the mean gradient of n "
    "trajectories, divided by the decrease along the exact gradient, by discount γ of later costs; "
    "above the line, a biased gradient does better than the exact one. Medians over random tabular "
    "worlds, bands: 95 % bootstrap intervals. And the share of worlds in which γ = 0 beats γ = 1 "
    "however large n is, by the root mean square difference of the two models' logits, with 95 % "
    "bootstrap intervals."
)
ESTIMATORS = ("plain", "rb_all_value")
DISTANCE = 0.7
GAMMAS = (0.0, 0.5, 0.9, 1.0)
COLORS = dict(zip(GAMMAS, style.sequential_colors(len(GAMMAS)), strict=True))
ENOUGH = 0.9
"""Share of the exact gradient's improvement that a title names the batch size of."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the share by batch size for two estimators, and worlds where γ = 0 always wins."""
    column = style.is_column(width)
    size = (3, 1, 5.9) if column else (1, 3, 3.0)
    figure, (sampled, quiet, never) = style.make_panels(*size, width=width)
    if column:
        never.get_gridspec().set_height_ratios([1, 1, 0.6])
    for axes, name in zip((sampled, quiet), ESTIMATORS, strict=True):
        draw_shares(axes, table, name)
    draw_worlds(never, table)
    for axes in (sampled, quiet) if column else (sampled,):
        axes.set_ylabel("decrease of J\n(exact gradient: 1)")
    colors = {f"γ = {gamma:g}": color for gamma, color in COLORS.items()}
    handles: list[Any] = rows.legend_lines(colors, marker="o", ms=2.5)
    handles.append((rows.band_mark(), rows.interval_mark()))  # drawn over each other
    figure.legend(
        handles,
        [*colors, "95 % interval"],
        loc="outside lower center",
        ncols=3 if column else 5,
    )
    return figure


def draw_shares(axes: Any, table: pd.DataFrame, name: str) -> None:
    """Draw the share against batch size, one line a discount."""
    shares = rows.select_rows(table, "share", "n", estimator=name, distance=DISTANCE)
    curves = [
        (
            shares[shares["gamma"] == gamma],
            {"color": color, "label": f"γ = {gamma:g}", "marker": "o", "ms": 2.5},
        )
        for gamma, color in COLORS.items()
    ]
    axes.set_ylim(0, 1.2)
    rows.plot_curves(axes, curves, "n")
    axes.axhline(1, color="black", lw=0.6, zorder=1)
    place = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(0.99, 0.99, "above 1: better than exact", color="#444444", fontsize=7, **place)
    axes.set(xscale="log", xlabel="trajectories n")
    axes.xaxis.minorticks_off()
    enough = shares[(shares["gamma"] == GAMMAS[-1]) & (shares["value"] >= ENOUGH)]["n"]
    finding = f":\nγ = {GAMMAS[-1]:g} reaches {ENOUGH:g} at n = {enough.min():,.0f}"
    axes.set_title(estimator_title(name) + ("" if enough.empty else finding))


def draw_worlds(axes: Any, table: pd.DataFrame) -> None:
    """Draw the share of worlds where γ = 0 beats γ = 1 at any batch size, by teacher distance."""
    never = rows.select_rows(table, "never", "distance", estimator=ESTIMATORS[0])
    spread = [never["value"] - never["low"], never["high"] - never["value"]]
    axes.errorbar(
        range(len(never)), never["value"], yerr=spread, fmt="o", ms=4, lw=1, color=style.GREY
    )
    axes.set_xticks(range(len(never)), [f"{x:g}" for x in never["distance"]])
    axes.set(xlabel="distance of the teacher (logits)", ylabel="share of worlds", ylim=(0, 1))
    axes.set_xlim(-0.5, len(never) - 0.5)
    axes.set_title(f"γ = 0 beats γ = 1 at every n\nin {span(never)} of the worlds")


def span(values: pd.DataFrame) -> str:
    """Return the range of some shares in per cent."""
    low, high = (f"{100 * x:.0f}" for x in (values["value"].min(), values["value"].max()))
    return f"{low} %" if low == high else f"{low} to {high} %"
