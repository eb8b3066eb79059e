"""Trade-off between bias and variance: every discount, and the best one by batch size."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("quantity", "estimator", "horizon", "gamma", "n", "value", "low", "high")
CAPTION = (
    "Squared bias against the variance of a batch's mean gradient, both relative to ‖∇J‖², at "
    "three batch sizes; one curve per estimator, one point per discount. Medians over worlds at "
    "the longest horizon, with 95 % bootstrap intervals of the bias. Grey: lines of equal mean "
    "squared error, each ten times the previous one. Stars: the discount with the smallest error "
    "at that batch size (the median over worlds of each world's own best). Bias below 1e-5 is "
    "drawn at 1e-5."
)
SIZES = (16.0, 1024.0, 65536.0)
NAMES = {
    "plain": "as sampled",
    "value": "value baseline",
    "rb_all_value": "mean costs, value baseline",
}
FLOOR = 1e-5


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a batch size."""
    figure, axes = style.make_panels(1, len(SIZES), 2.9, width=width)
    longest = table["horizon"].max()
    table = table[table["horizon"] == longest]
    for ax, n in zip(axes, SIZES, strict=True):
        draw_equal_errors(ax)
        for (estimator, label), colour in zip(NAMES.items(), style.CYCLE, strict=False):
            draw_curve(ax, table[table["estimator"] == estimator], n, colour, label)
        ax.set(xscale="log", yscale="log", xlabel="variance / ‖∇J‖²")
        ax.set(xlim=(1e-7, 1e3), xticks=[1e-6, 1e-4, 1e-2, 1, 100], ylim=(FLOOR / 2, 0.1))
        ax.set_title(f"{n:,.0f} trajectories".replace(",", " "))
    for ax in axes[1:]:
        ax.tick_params(labelleft=False)
    axes[0].set_ylabel("squared bias / ‖∇J‖²")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_curve(axes: Any, rows: pd.DataFrame, n: float, colour: str, label: str) -> None:
    """Draw an estimator by discount; label both ends, and mark the best discount with a star."""
    bias = rows[rows["quantity"] == "bias2"].set_index("gamma").sort_index()
    errors = rows[(rows["quantity"] == "mse") & (rows["n"] == n)].set_index("gamma").sort_index()
    noise = errors["value"] - bias["value"]
    y, low, high = (bias[name].clip(lower=FLOOR) for name in ("value", "low", "high"))
    spread = [y - low, high - y]
    options = {
        "color": colour,
        "lw": 1,
        "elinewidth": 0.6,
        "marker": "o",
        "ms": 2.5,
        "label": label,
    }
    axes.errorbar(noise, y, yerr=spread, **options)
    if label == NAMES["plain"]:
        for gamma in (noise.index[0], noise.index[-1]):
            text = f"γ = {gamma:g}"
            annotation_options = {"textcoords": "offset points", "xytext": (1, 5), "fontsize": 6.5}
            axes.annotate(text, (noise[gamma], y[gamma]), color=colour, **annotation_options)
    best = rows[(rows["quantity"] == "best_gamma") & (rows["n"] == n)]["value"].iloc[0]
    axes.plot(noise[best], y[best], "*", ms=9, color=colour, mec="black", mew=0.5, zorder=5)


def draw_equal_errors(axes: Any) -> None:
    """Draw lines of variance + squared bias = 10^k."""
    for power in range(-5, 3):
        total = 10.0**power
        x = total * (1 - np.geomspace(1e-7, 1, 200))[:-1]
        x = np.concatenate([np.geomspace(1e-9, total / 2, 60), np.sort(x[x > total / 2])])
        axes.plot(x, np.maximum(total - x, 1e-12), color="#CCCCCC", lw=0.7, zorder=0)
