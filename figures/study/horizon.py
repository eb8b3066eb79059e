"""Gradient variance against the horizon, its local exponents, and the published bounds."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.study import rows
from figures.study.estimators import estimator_name

COLUMNS = ("quantity", "world", "estimator", "gamma", "horizon", "value", "low", "high")
CAPTION = (
    "Variance of the policy gradient of one trajectory of T tokens, exact, in random tabular "
    "chains: by discount γ of later costs (with the exponent of T at the longest horizon), where "
    "all states mix and where two classes of states never do; and at γ = 1 by variance reduction, "
    "with the local exponent d log variance / d log T. Dashed and dotted grey: upper bounds on the "
    "variance at γ = 1. Mean costs: each token's cost is replaced by its mean over tokens. Medians "
    "over worlds; bands, mostly narrower than the lines: 95 % bootstrap intervals. Alternating "
    "colors: curves that coincide."
)
LOOKS: dict[str, dict[str, Any]] = {
    name: {
        "color": rows.ESTIMATOR_COLORS[name],
        "label": estimator_name(name),
        "linestyle": "--" if name.startswith("rb_all") else "-",
        "linewidth": 3 if name == "position_value" else 1.4,
    }
    for name in ("plain", "rb_all", "position_value", "value", "optimal", "rb_all_value")
}
"""Options of the curve of each estimator whose variance at γ = 1 is compared."""
WORLDS = {"mixing": "All states mix", "absorbing": "Two classes never mix"}
VARIANCE = "variance (nats²)"


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw variance by discount in both worlds, and variance and exponents by reduction."""
    column = style.is_column(width)
    if column:  # the claim is about the exponents, with and without variance reduction
        figure, (mixing, exponent) = style.make_panels(2, 1, 5.8, width=width)
    else:
        figure, (mixing, absorbing, reduced, exponent) = style.make_panels(2, 2, 6.0, width=width)
        draw_by_discount(absorbing, table, "absorbing")
        draw_by_reduction(reduced, table)
    draw_by_discount(mixing, table, "mixing")
    draw_bounds(mixing, table)
    draw_exponents(exponent, table)
    handles = [*(Line2D([], [], **look) for look in LOOKS.values()), rows.band_mark()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if column else 4)
    return figure


def draw_by_discount(axes: Any, table: pd.DataFrame, world: str) -> None:
    """Draw the variance of one trajectory against the horizon, one line a discount."""
    curves = rows.select_rows(table, "variance", "horizon", world=world, estimator="plain")
    gammas = sorted(curves["gamma"].unique())
    slopes = table[(table["quantity"] == "last_slope") & (table["world"] == world)]
    slopes = slopes[slopes["estimator"] == "plain"].set_index("gamma")["value"]
    for gamma, color in zip(gammas, style.sequential_colors(len(gammas)), strict=True):
        label = f"γ = {gamma:g}: $T^{{{slopes[gamma]:.2f}}}$"
        rows.plot_line(axes, curves[curves["gamma"] == gamma], "horizon", color=color, label=label)
    axes.set_yscale("log")
    rows.label_horizons(axes, curves)
    axes.set_ylabel(VARIANCE)
    axes.set_title(
        f"{WORLDS[world]}: variance grows as\n"
        + " to ".join(rows.power_of_horizon(slopes, gamma) for gamma in (gammas[0], gammas[-1]))
    )
    axes.legend(loc="upper left")


def draw_bounds(axes: Any, table: pd.DataFrame) -> None:
    """Draw the tight and the published bound, and make room for a longer legend."""
    for name, dash, label in (
        ("tight", "--", "tight bound, $T^3$"),
        ("published", ":", "published, $T^4$"),
    ):
        bound = rows.select_rows(table, name, "horizon", world="mixing")
        axes.plot(bound["horizon"], bound["value"], dash, color=style.GREY, lw=1, label=label)
    axes.set_ylim(top=1e6 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=2)


def draw_by_reduction(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance at γ = 1 against the horizon, one line a variance reduction."""
    axes.set_yscale("log")
    curves = curves_by_reduction(table, "variance")
    rows.plot_curves(axes, curves, "horizon")
    rows.label_horizons(axes, curves[0][0])
    axes.set_ylabel(VARIANCE)
    ends = {name: x["value"].iloc[-1] for name, (x, _) in zip(LOOKS, curves, strict=True)}
    times = ends["plain"] / ends["value"]
    longest = curves[0][0]["horizon"].iloc[-1]
    axes.set_title(
        f"γ = 1: a value baseline divides\nthe variance by {times:.2g} at T = {longest:g}"
    )


def draw_exponents(axes: Any, table: pd.DataFrame) -> None:
    """Draw the local exponent of the variance against the horizon."""
    curves = curves_by_reduction(table, "slope")
    rows.plot_curves(axes, curves, "horizon")
    rows.label_horizons(axes, curves[0][0])
    for degree, name in ((1, "linear"), (2, "quadratic"), (3, "cubic")):
        axes.axhline(degree, color=style.GREY, lw=0.8, ls=":", zorder=1)
        place = {"transform": axes.get_yaxis_transform(), "va": "bottom", "ha": "right"}
        axes.text(0.99, degree + 0.02, name, fontsize=7, color="#444444", **place)
    ends = {name: x["value"].iloc[-1] for name, (x, _) in zip(LOOKS, curves, strict=True)}
    axes.set(ylabel="local exponent of T", ylim=(0.8, 3.4))
    axes.set_title(
        f"γ = 1: exponent {ends['plain']:.1f} as sampled,\n"
        f"{ends['value']:.1f} with a value baseline"
    )


def curves_by_reduction(table: pd.DataFrame, quantity: str) -> list[rows.Curve]:
    """Return the curve of each variance reduction at γ = 1 in the mixing chain.

    Args:
        table: The table of the figure.
        quantity: Quantity of the curves.

    Returns:
        The curves in the order of `LOOKS`.
    """
    where: dict[str, Any] = {"world": "mixing", "gamma": 1.0}
    return [
        (
            rows.select_rows(table, quantity, "horizon", estimator=name, **where),
            look,
        )
        for name, look in LOOKS.items()
    ]
