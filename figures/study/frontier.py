"""Trade-off between bias and variance: every discount, and the best one by batch size."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.study import rows
from figures.study.estimators import estimator_name

COLUMNS = ("quantity", "estimator", "horizon", "gamma", "n", "value", "low", "high")
CAPTION = (
    "Squared bias against the variance of a batch's mean gradient, both relative to ‖∇J‖² of the "
    "sequence KL J, at three batch sizes; one curve per estimator, one point per discount γ. "
    "Medians over random tabular worlds at the longest horizon, with 95 % bootstrap intervals of "
    "the bias. Grey: lines of equal mean squared error, each ten times the previous one. Stars: "
    "the discount with the smallest error at that batch size (the median over worlds of each "
    "world's own best). Bias below 1e-5 is drawn at 1e-5."
)
SIZES = (16.0, 1024.0, 65536.0)
ESTIMATORS = ("plain", "value", "rb_all_value")
FLOOR = 1e-5


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a batch size."""
    column = style.is_column(width)
    size = (len(SIZES), 1, 6.6) if column else (1, len(SIZES), 3.1)
    figure, axes = style.make_panels(*size, width=width)
    table = table[table["horizon"] == table["horizon"].max()]
    for ax, n in zip(axes, SIZES, strict=True):
        draw_equal_errors(ax)
        best = [draw_curve(ax, table[table["estimator"] == name], n, name) for name in ESTIMATORS]
        ax.set(xscale="log", yscale="log")
        ax.set(xlim=(1e-7, 1e4), xticks=[1e-6, 1e-4, 1e-2, 1, 100], ylim=(FLOOR / 2, 0.1))
        ax.minorticks_off()
        ax.set_title(f"{n:,.0f} trajectories:\n" + best_discounts(best))
    for ax in axes if column else axes[:1]:
        ax.set_ylabel("squared bias / ‖∇J‖²")
    for ax in axes[:-1] if column else []:
        ax.tick_params(labelbottom=False)
    for ax in [] if column else axes[1:]:
        ax.tick_params(labelleft=False)
    for ax in axes[-1:] if column else axes:
        ax.set_xlabel("variance / ‖∇J‖²")
    figure.legend(handles=legend_marks(), loc="outside lower center", ncols=2 if column else 3)
    return figure


def best_discounts(gammas: list[float]) -> str:
    """Return the range of the best discounts of the estimators."""
    low, high = min(gammas), max(gammas)
    return f"best γ = {low:g}" + ("" if low == high else f" to {high:g}")


def legend_marks() -> list[Line2D]:
    """Return one mark for the legend per estimator, star, line of equal error, and interval."""
    colors = {estimator_name(name): rows.ESTIMATOR_COLORS[name] for name in ESTIMATORS}
    star: dict[str, Any] = {
        "marker": "*",
        "ms": 8,
        "mec": "black",
        "mew": 0.5,
        "mfc": "white",
        "lw": 0,
    }
    return [
        *rows.legend_lines(colors, marker="o", ms=2.5, lw=1),
        Line2D([], [], label="smallest error", **star),
        Line2D([], [], color="#BBBBBB", lw=0.8, label="equal error, steps of 10"),
        rows.interval_mark("95 % interval of the bias"),
    ]


def draw_curve(axes: Any, curve: pd.DataFrame, n: float, estimator: str) -> float:
    """Draw an estimator by discount, and a star at its best discount.

    Args:
        axes: Axes to draw on.
        curve: Rows of the estimator.
        n: Batch size.
        estimator: Its code name; the ends of the first one's curve are labelled.

    Returns:
        The best discount.
    """
    bias = curve[curve["quantity"] == "bias2"].set_index("gamma").sort_index()
    errors = curve[(curve["quantity"] == "mse") & (curve["n"] == n)].set_index("gamma").sort_index()
    noise = errors["value"] - bias["value"]
    y, low, high = (bias[name].clip(lower=FLOOR) for name in ("value", "low", "high"))
    color = rows.ESTIMATOR_COLORS[estimator]
    look = {"color": color, "lw": 1, "elinewidth": 0.6, "marker": "o", "ms": 2.5}
    axes.errorbar(noise, y, yerr=[y - low, high - y], **look)
    if estimator == ESTIMATORS[0]:
        for gamma in (noise.index[0], noise.index[-1]):
            place = {"textcoords": "offset points", "xytext": (4, 3), "fontsize": 7}
            axes.annotate(f"γ = {gamma:g}", (noise[gamma], y[gamma]), color=color, **place)
    best = curve[(curve["quantity"] == "best_gamma") & (curve["n"] == n)]["value"].iloc[0]
    axes.plot(noise[best], y[best], "*", ms=8, color=color, mec="black", mew=0.5, zorder=5)
    return float(best)


def draw_equal_errors(axes: Any) -> None:
    """Draw lines of variance + squared bias = 10^k."""
    for power in range(-5, 3):
        total = 10.0**power
        x = total * (1 - np.geomspace(1e-7, 1, 200))[:-1]
        x = np.concatenate([np.geomspace(1e-9, total / 2, 60), np.sort(x[x > total / 2])])
        axes.plot(x, np.maximum(total - x, 1e-12), color="#CCCCCC", lw=0.7, zorder=0)
