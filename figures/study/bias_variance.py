"""Effect of the discount on bias, variance and error in the synthetic study."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows
from figures.study.estimators import estimator_name

COLUMNS = ("quantity", "estimator", "horizon", "gamma", "n", "value", "low", "high")
CAPTION = (
    "Estimators of the gradient of the sequence KL J that discount later costs by γ, exact in "
    "random tabular worlds: variance of one trajectory of T tokens (with the exponent of T at the "
    "longest horizon, and two upper bounds at γ = 1); squared bias by discount and horizon; mean "
    "squared error by number of trajectories n, with the n from which γ = 1 errs less than γ = 0; "
    "and the discount with the smallest error by n and estimator. Mean costs: a cost is replaced "
    "by its mean over tokens, all costs or the later ones. Medians over random worlds; bands: 95 % "
    "bootstrap intervals, of the bias at the shortest and the longest horizon only. Best "
    "discounts that are equal are drawn side by side."
)
ESTIMATORS = ("plain", "rb_future", "value", "rb_all_value")


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw variance by horizon, bias by discount, error by batch size, and the best discount."""
    if style.is_column(width):  # bias and variance together are the error
        figure, (error, best) = style.make_panels(2, 1, 4.8, width=width)
    else:
        figure, (variance, bias, error, best) = style.make_panels(2, 2, 5.6, width=width)
        draw_variance(variance, table)
        draw_bias(bias, table)
    draw_error(error, table)
    draw_best(best, table)
    return figure


def select_rows(table: pd.DataFrame, quantity: str, **filters: Any) -> pd.DataFrame:
    """Select the rows of one quantity whose columns have the given values.

    Args:
        table: A summary table.
        quantity: Value of the column `quantity`.
        **filters: Values of other columns.

    Returns:
        The selected rows, sorted by horizon, discount and batch size.
    """
    selected = table[table["quantity"] == quantity]
    for column, value in filters.items():
        selected = selected[selected[column] == value]
    return selected.sort_values(["horizon", "gamma", "n"])


def draw_variance(axes: Any, table: pd.DataFrame) -> None:
    """Draw the total variance of one trajectory's gradient by horizon, with both bounds."""
    plain = select_rows(table, "variance", estimator="plain")
    gammas = [g for g in (0.0, 0.5, 0.9, 0.98, 1.0) if g in set(plain["gamma"])]
    slopes = select_rows(table, "exponent", estimator="plain").set_index("gamma")["value"]
    for gamma, color in zip(gammas, style.sequential_colors(len(gammas)), strict=True):
        label = f"γ = {gamma:g}: $T^{{{slopes[gamma]:.1f}}}$"
        rows.plot_line(axes, plain[plain["gamma"] == gamma], "horizon", color=color, label=label)
    for name, label, dash in (
        ("bound_tight", "tight bound, $T^3$", "--"),
        ("bound_quartic", "published, $T^4$", ":"),
    ):
        bound = select_rows(table, name, gamma=1.0)
        axes.plot(bound["horizon"], bound["value"], dash, color=style.GREY, lw=1, label=label)
    axes.set(yscale="log", ylabel="variance (nats²)")
    rows.label_horizons(axes, plain)
    powers = [rows.power_of_horizon(slopes, gamma) for gamma in (gammas[0], gammas[-1])]
    axes.set_title("Variance grows as\n" + " to ".join(powers))
    axes.set_ylim(top=1e6 * axes.get_ylim()[1])  # space for the legend
    axes.legend(ncols=2, loc="upper left")


def draw_bias(axes: Any, table: pd.DataFrame) -> None:
    """Draw squared bias against the discount, one line a horizon; two have their interval."""
    bias = select_rows(table, "bias2", estimator="plain")
    horizons = sorted(bias["horizon"].unique())
    for horizon, color in zip(horizons, style.sequential_colors(len(horizons)), strict=True):
        part = bias[bias["horizon"] == horizon]
        axes.plot(part["gamma"], part["value"], color=color, label=f"T = {horizon:g}")
        if horizon in (horizons[0], horizons[-1]):
            band = {"color": color, "alpha": 0.16, "linewidth": 0}
            axes.fill_between(part["gamma"], part["low"], part["high"], **band)
    axes.set(xlabel="discount γ", ylabel="squared bias / ‖∇J‖²")
    axes.set_ylim(bottom=0)
    worst = bias[bias["gamma"] == bias["gamma"].min()]["value"].max()
    axes.set_title(f"Squared bias is at most\n{100 * worst:.2g} % of ‖∇J‖²")
    axes.legend(handles=[*axes.lines, rows.band_mark()], ncols=2)


def draw_error(axes: Any, table: pd.DataFrame) -> None:
    """Draw mean squared error against batch size at the longest horizon, with the crossover."""
    errors = select_rows(table, "mse", estimator="plain")
    gammas = [g for g in (0.0, 0.5, 0.9, 1.0) if g in set(errors["gamma"])]
    for gamma, color in zip(gammas, style.sequential_colors(len(gammas)), strict=True):
        part = errors[errors["gamma"] == gamma]
        rows.plot_line(axes, part, "n", color=color, label=f"γ = {gamma:g}")
    cross = select_rows(table, "overtaking_batch", estimator="plain")
    if len(cross) and np.isfinite(cross["value"].iloc[0]):
        mark_crossover(axes, float(cross["value"].iloc[0]), float(errors["n"].max()))
    axes.set(
        xscale="log", yscale="log", xlabel="trajectories n", ylabel="mean squared error / ‖∇J‖²"
    )
    axes.minorticks_off()
    drawn = errors[errors["gamma"].isin(gammas)]
    ends = [drawn[drawn["n"] == n] for n in (drawn["n"].min(), drawn["n"].max())]
    least = [part.loc[part["value"].idxmin()] for part in ends]
    axes.set_title(
        f"Least error (T = {errors['horizon'].max():g}): γ = {least[0]['gamma']:g} at "
        f"n = {least[0]['n']:,.0f},\nγ = {least[1]['gamma']:g} at n = {least[1]['n']:,.0f}"
    )
    axes.legend(loc="lower left", ncols=2)
    axes.set_ylim(bottom=axes.get_ylim()[0] / 30)  # space for the legend


def mark_crossover(axes: Any, n: float, largest: float) -> None:
    """Mark the batch size from which γ = 1 has a smaller error than γ = 0."""
    axes.axvline(n, color=style.GREY, lw=1, ls="--")
    late = n > largest**0.5
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


def draw_best(axes: Any, table: pd.DataFrame) -> None:
    """Draw the discount with the smallest error against batch size, one line an estimator."""
    best = select_rows(table, "best_gamma")
    curves = [
        (
            best[best["estimator"] == name],
            {"color": rows.ESTIMATOR_COLORS[name], "label": estimator_name(name)},
        )
        for name in ESTIMATORS
    ]
    rows.plot_best_discounts(axes, curves)
    axes.set_title("The best discount" + (" rises with n" if rises(best) else ""))
    axes.legend(loc="lower right")


def rises(best: pd.DataFrame) -> bool:
    """Return whether no estimator's best discount falls from one batch size to a larger one."""
    groups = best.groupby("estimator")
    return all(group.sort_values("n")["value"].is_monotonic_increasing for _, group in groups)
