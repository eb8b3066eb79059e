"""Learning curves of a capacity-limited student under every objective."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.study import rows

COLUMNS = ("quantity", "objective", "optimizer", "clip", "iteration", "value", "low", "high")
CAPTION = (
    "A linear student that cannot represent its teacher, trained with Adam on nine objectives: "
    "sequence KL J and KL per token on the teacher's prefixes, both relative to the best optimum "
    "of J found, and how far the mean of a reward that neither model sees stays below its value "
    "there. And the final J by optimizer and gradient clipping, learning rates tuned alike (title: "
    "largest ratios). γ: "
    "sampled reverse KL with later costs discounted by γ; mean costs: costs replaced by their "
    "means over tokens, with a leave-one-out baseline; top 2: a loss on the teacher's 2 most "
    "probable of 6 tokens. Medians over random worlds with 95 % bootstrap intervals, of the "
    "curves at their end."
)
LOOKS: dict[str, dict[str, Any]] = {
    name: {"color": color, "label": label}
    for name, label, color in (
        ("token", "γ = 0", style.SKY),
        ("gamma 0.9", "γ = 0.9", "#8C564B"),
        ("sequence", "γ = 1", style.RED),
        ("sequence, leave one out", "γ = 1, leave-one-out", style.ORANGE),
        ("sequence, mean costs", "γ = 1, mean costs", style.PURPLE),
        ("local KL", "full reverse KL", style.BLUE),
        ("top 2, sampled tail", "top 2, sampled tail", style.GREY),
        ("top 2", "top 2, renormalised", style.GREEN),
        ("top 2, un-normalised", "top 2, un-normalised", "black"),
    )
}
"""Color and printed name of each objective."""
KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("adam", "none"): {"marker": "o", "label": "Adam"},
    ("adam", "0.5"): {"marker": "o", "mfc": "white", "label": "Adam, clipped"},
    ("sgd", "none"): {"marker": "s", "label": "SGD"},
    ("sgd", "0.5"): {"marker": "s", "mfc": "white", "label": "SGD, clipped"},
}
"""Marker and printed name of each optimizer and gradient clipping."""
PANELS = (
    ("excess", "sequence KL J / optimum − 1"),
    ("teacher_excess", "KL per token / optimum's − 1"),
    ("reward_short", "optimum's − mean reward"),
)
TITLES = {
    "teacher_excess": "The same on the\nteacher's prefixes",
    "reward_short": "Reward unseen by both models:\nhow far below the optimum's",
}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw three panels of curves with Adam, and the final J by optimizer and gradient clipping."""
    if style.is_column(width):  # the other two quantities follow J
        figure, axes = style.make_panels(2, 1, 6.2, width=width)
    else:
        figure, axes = style.make_panels(2, 2, 6.4, width=width)
    *curves, final = axes
    for ax, (quantity, label) in zip(curves, PANELS, strict=False):
        draw_curves(ax, table, quantity, label)
    draw_final(final, table)
    handles = [Line2D([], [], **look) for look in LOOKS.values()]
    handles += [Line2D([], [], color="#444444", ms=3, lw=0, **mark) for mark in KINDS.values()]
    handles.append(rows.interval_mark())
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2 if style.is_column(width) else 4
    )
    return figure


def draw_curves(axes: Any, table: pd.DataFrame, quantity: str, label: str) -> None:
    """Draw a quantity by iteration, one line an objective, with the intervals of its end."""
    if quantity == "excess":
        axes.set_yscale("log")
    elif quantity == "teacher_excess":
        axes.set_yscale("symlog", linthresh=0.1)
    where = {"optimizer": "adam", "clip": "none"}
    curves = [
        (rows.select_rows(table, quantity, "iteration", objective=name, **where), look)
        for name, look in LOOKS.items()
    ]
    rows.plot_curves(axes, curves, "iteration", bands=False)
    rows.plot_end_intervals(axes, curves, "iteration", share=0.2)
    axes.set(xlabel="iteration (Adam)", ylabel=label)
    axes.set_title(TITLES.get(quantity) or describe_end(curves))


def describe_end(curves: list[rows.Curve]) -> str:
    """Return how many times farther from the optimum γ = 1 ends than γ = 0."""
    ends = {look["label"]: part["value"].iloc[-1] for part, look in curves if len(part)}
    times = ends["γ = 1"] / ends["γ = 0"]
    return f"γ = 1 ends {times:.2g} times as far\nfrom the optimum as γ = 0"


def draw_final(axes: Any, table: pd.DataFrame) -> None:
    """Draw the final J of every objective, by optimizer and clipping."""
    final = table[table["quantity"] == "final"].set_index(["objective", "optimizer", "clip"])
    places = np.arange(len(LOOKS))[::-1]
    for shift, (kind, marker) in zip(
        np.linspace(0.3, -0.3, len(KINDS)), KINDS.items(), strict=True
    ):
        for y, (name, look) in zip(places, LOOKS.items(), strict=True):
            row = final.loc[(name, *kind)]
            spread = [[max(row["value"] - row["low"], 0)], [row["high"] - row["value"]]]
            options = {"color": look["color"], "ms": 3, "lw": 0.8, "mew": 0.8} | marker
            axes.errorbar(row["value"], y + shift, xerr=spread, **options)
    axes.set_yticks(places, [look["label"] for look in LOOKS.values()], fontsize=7)
    axes.set(xscale="log", xlabel="final J / optimum − 1")
    axes.grid(visible=False, axis="y")
    axes.set_title(describe_spread(final["value"].unstack("objective")))


def describe_spread(final: pd.DataFrame) -> str:
    """Return by how much the final J differs between objectives, and between optimizers.

    Args:
        final: Final J by optimizer and clipping (rows) and objective (columns).

    Returns:
        A title.
    """
    if not (final > 0).all(axis=None):
        return "Final J, learning rates tuned alike"
    objectives = (final.max(axis=1) / final.min(axis=1)).max()
    optimizers = (final.max() / final.min()).max()
    return f"{objectives:.0f}-fold between objectives,\n{optimizers:.1f}-fold between optimizers"
