"""The study: what the discount does to bias, variance and error, from the summary table."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line

COLUMNS = ("quantity", "estimator", "horizon", "gamma", "n", "value", "low", "high")
NAMES = {
    "plain": "as sampled",
    "value": "value baseline",
    "rb_future": "mean later costs",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame) -> Figure:
    """Four panels: variance by horizon, bias by discount, error by batch size, best discount."""
    figure, (variance, bias, error, best) = style.panels(2, 2, 5.2)
    draw_variance(variance, table)
    draw_bias(bias, table)
    draw_error(error, table)
    draw_best(best, table)
    return figure


def pick(table: pd.DataFrame, quantity: str, **where: Any) -> pd.DataFrame:
    """Rows of one quantity, in order of horizon, discount and batch size."""
    chosen = table[table["quantity"] == quantity]
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    return chosen.sort_values(["horizon", "gamma", "n"])


def draw_variance(axes: Any, table: pd.DataFrame) -> None:
    """Total variance of one trajectory's gradient against the horizon, with both worst cases."""
    plain = pick(table, "variance", estimator="plain")
    gammas = [g for g in (0.0, 0.5, 0.9, 0.98, 1.0) if g in set(plain["gamma"])]
    for gamma, colour in zip(gammas, style.shades(len(gammas)), strict=True):
        slope = pick(table, "exponent", estimator="plain", gamma=gamma)["value"].iloc[0]
        label = f"γ = {gamma:g}  ($T^{{{slope:.1f}}}$)"
        line(axes, plain[plain["gamma"] == gamma], "horizon", color=colour, label=label)
    for name, label, dash in (
        ("bound_tight", "tight bound", "--"),
        ("bound_quartic", "published bound, $T^4$", ":"),
    ):
        rows = pick(table, name, gamma=1.0)
        axes.plot(rows["horizon"], rows["value"], dash, color=style.GREY, lw=1, label=label)
    axes.set(yscale="log", xlabel="horizon T", ylabel="variance of one trajectory, nats²")
    axes.set_xscale("log", base=2)
    axes.set_title("How fast does variance grow?")
    axes.set_ylim(top=1e4 * axes.get_ylim()[1])  # room for the legend
    axes.legend(ncols=2, loc="upper left")


def draw_bias(axes: Any, table: pd.DataFrame) -> None:
    """Squared bias against the discount, one line a horizon."""
    rows = pick(table, "bias2", estimator="plain")
    horizons = sorted(rows["horizon"].unique())
    for horizon, colour in zip(horizons, style.shades(len(horizons)), strict=True):
        at = rows[rows["horizon"] == horizon]
        line(axes, at, "gamma", color=colour, label=f"T = {horizon:g}")
    axes.set(xlabel="discount γ", ylabel="squared bias / ‖∇J‖²")
    axes.set_ylim(bottom=0)
    axes.set_title("What does cutting the future cost?")
    axes.legend(ncols=2)


def draw_error(axes: Any, table: pd.DataFrame) -> None:
    """Mean squared error against trajectories at the longest horizon, and where lines cross."""
    rows = pick(table, "mse", estimator="plain")
    gammas = [g for g in (0.0, 0.5, 0.9, 1.0) if g in set(rows["gamma"])]
    for gamma, colour in zip(gammas, style.shades(len(gammas)), strict=True):
        line(axes, rows[rows["gamma"] == gamma], "n", color=colour, label=f"γ = {gamma:g}")
    cross = pick(table, "overtaking_batch", estimator="plain")
    if len(cross) and np.isfinite(cross["value"].iloc[0]):
        n = cross["value"].iloc[0]
        axes.axvline(n, color=style.GREY, lw=1, ls="--")
        late = n > float(rows["n"].max()) ** 0.5
        axes.annotate(
            f"γ = 1 beats γ = 0\nfrom n ≈ {n:,.0f}",
            (n, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            va="top",
            fontsize=7,
            color="#444444",
        )
    longest = int(rows["horizon"].max())
    axes.set(
        xscale="log", yscale="log", xlabel="trajectories n", ylabel="mean squared error / ‖∇J‖²"
    )
    axes.set_title(f"Which discount errs least? (T = {longest})")
    axes.legend(loc="lower left")


def draw_best(axes: Any, table: pd.DataFrame) -> None:
    """The discount of least error against trajectories, by estimator."""
    rows = pick(table, "best_gamma")
    for (name, label), colour in zip(NAMES.items(), style.CYCLE, strict=False):
        at = rows[rows["estimator"] == name]
        line(axes, at, "n", color=colour, label=label, marker="o", ms=2.5)
    axes.set(xscale="log", xlabel="trajectories n", ylabel="best discount γ", ylim=(-0.04, 1.04))
    axes.set_title("Does less noise change the answer?")
    axes.legend(loc="lower right")
