"""Row selection and curves of the study's summary tables, shared by its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from figures import style

Curve = tuple[pd.DataFrame, dict[str, Any]]
"""Rows of a curve, and its options of `Axes.plot`."""
DASH = 2.5
"""Length of the dashes of coinciding curves, in line widths."""
STEP = 1.2
"""Points between best discounts that are equal, and width of their lines."""
COINCIDE = 0.03
"""Curves coincide where they differ by less than this fraction of the range of all curves."""
FORM_COLORS = {
    "full_reverse_kl": "black",
    "sampled_tail": style.ORANGE,
    "published_tail": style.SKY,
    "bucket": style.PURPLE,
    "stopped": style.GREEN,
    "and_sampled": style.GREY,
    "renormalised": style.BLUE,
    "unnormalised": style.RED,
}
"""Color of each form of a top-K loss, in the order of the legend."""
ESTIMATOR_COLORS = {
    "plain": style.BLUE,
    "position_value": style.SKY,
    "value": style.GREEN,
    "optimal": style.PURPLE,
    "leave_one_out": style.PURPLE,
    "rb_all": style.ORANGE,
    "rb_future": style.ORANGE,
    "rb_all_value": style.RED,
}
"""Color of each estimator; no figure draws two of the same color."""


def select_rows(
    table: pd.DataFrame, quantity: str, order_column: str, **filters: Any
) -> pd.DataFrame:
    """Select the rows of one quantity whose columns have the given values.

    Args:
        table: A summary table with the column `quantity`.
        quantity: Value of that column.
        order_column: Column to sort by; rows without a value in it are dropped.
        **filters: Values of other columns.

    Returns:
        The selected rows, sorted.
    """
    rows = table[table["quantity"] == quantity]
    for column, value in filters.items():
        rows = rows[rows[column] == value]
    return rows.dropna(subset=[order_column]).sort_values(order_column)


def plot_line(axes: Any, rows: pd.DataFrame, x: str, **options: Any) -> None:
    """Plot `value` against the column `x`, with its interval as a band."""
    style.plot_band(axes, rows[x], rows["value"], rows["low"], rows["high"], **options)


def plot_curves(axes: Any, curves: Sequence[Curve], x: str, *, bands: bool = True) -> None:
    """Plot several curves so that those that coincide stay visible.

    Coinciding curves become one line of dashes in all their colors, with a single grey band. The
    scale of the axes must be set before.

    Args:
        axes: Axes to draw on.
        curves: The curves; those without rows are left out.
        x: Column of the horizontal coordinate.
        bands: Whether to draw the intervals as bands.
    """
    log = axes.get_yscale() == "log"
    limits = [] if axes.get_autoscaley_on() else list(axes.get_ylim())
    for group in group_coinciding(curves, x, log=log, limits=limits):
        for i, (rows, options) in enumerate(group):
            axes.plot(rows[x], rows["value"], **options | interleaving(i, len(group), options))
        rows, options = group[0]
        if bands:
            color = options["color"] if len(group) == 1 else style.GREY
            axes.fill_between(
                rows[x], rows["low"], rows["high"], color=color, alpha=0.16, linewidth=0
            )


def interleaving(index: int, count: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that draw one of `count` coinciding curves as every `count`-th dash."""
    if count == 1:
        return {}
    dashes: dict[str, Any] = {"linestyle": (-index % count * DASH, (DASH, (count - 1) * DASH))}
    dashes["linewidth"] = 1.4  # dashes are in line widths
    return dashes | ({"markevery": (index, count)} if "marker" in options else {})


def group_coinciding(
    curves: Sequence[Curve], x: str, *, log: bool, limits: Sequence[float] = ()
) -> list[list[Curve]]:
    """Group the curves that have nearly the same values at the same points.

    Args:
        curves: The curves; those without rows are left out.
        x: Column of the horizontal coordinate.
        log: Whether the vertical axis is logarithmic.
        limits: Limits of the vertical axis, where they are fixed.

    Returns:
        Groups of one or more curves, each compared with the first of its group.
    """
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return []
    xs = [rows[x].to_numpy(float) for rows, _ in curves]
    ys = [rows["value"].to_numpy(float) for rows, _ in curves]
    heights = np.concatenate([*ys, limits])
    if log:
        heights, *ys = (np.log10(np.where(y > 0, y, np.nan)) for y in (heights, *ys))
    tolerance = COINCIDE * (np.nanmax(heights) - np.nanmin(heights))
    groups: list[list[int]] = []
    for i, y in enumerate(ys):
        for group in groups:
            same_points = np.array_equal(xs[group[0]], xs[i])
            if same_points and np.abs(ys[group[0]] - y).max() <= tolerance:
                group.append(i)
                break
        else:
            groups.append([i])
    return [[curves[i] for i in group] for group in groups]


def plot_end_intervals(axes: Any, curves: Sequence[Curve], x: str, share: float = 0.13) -> None:
    """Draw the interval of each curve's last point as a bar beside the others, at the right.

    Args:
        axes: Axes with the curves and their final scales.
        curves: The curves; those without rows are left out.
        x: Column of the horizontal coordinate.
        share: Fraction of the width of the axes that the bars take.
    """
    curves = [curve for curve in curves if len(curve[0])]
    ends = [rows.iloc[-1] for rows, _ in curves]
    scale = axes.xaxis.get_transform()
    first, last = scale.transform(
        [min(float(rows[x].min()) for rows, _ in curves), max(float(row[x]) for row in ends)]
    )
    left, right = first - 0.03 * (last - first), last + share / (1 - share) * (last - first)
    end = scale.inverted().transform(last)
    axes.xaxis.minorticks_off()
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= end])
    axes.set_xlim(*scale.inverted().transform([left, right]))
    places = np.linspace(1 - 0.86 * share, 1 - 0.05 * share, len(curves))
    for place, row, (_, options) in zip(places, ends, curves, strict=True):
        mark = {"color": options["color"], "transform": axes.get_yaxis_transform()}
        axes.plot([place] * 2, [row["low"], row["high"]], lw=1, **mark)
        axes.plot(place, row["value"], "o", ms=2.2, **mark)


def legend_lines(colors: Mapping[str, str], **options: Any) -> list[Line2D]:
    """Return one solid line for a legend per name, whatever the dashes in the panels.

    Args:
        colors: Color by printed name.
        **options: Other options of the lines.

    Returns:
        The lines, with their names as labels.
    """
    return [Line2D([], [], color=color, label=name, **options) for name, color in colors.items()]


def interval_mark(label: str = "95 % interval") -> Line2D:
    """Return a grey vertical bar that explains intervals in a legend."""
    return Line2D([], [], color=style.GREY, marker="|", ms=7, mew=1, lw=0, label=label)


def band_mark(label: str = "95 % interval") -> Patch:
    """Return a grey patch that explains bands in a legend."""
    return Patch(color=style.GREY, alpha=0.3, linewidth=0, label=label)


def plot_best_discounts(axes: Any, curves: Sequence[Curve]) -> None:
    """Plot the best discount against batch size, one line an estimator or setting.

    Discounts are of a grid, so that curves share stretches: there they lie side by side, each a
    little above and left of the previous one.

    Args:
        axes: Axes to draw on.
        curves: The curves, from the lowest to the highest where they differ.
    """
    for i, (rows, look) in enumerate(curves):
        inches = (i - (len(curves) - 1) / 2) * STEP / 72
        shift = ScaledTranslation(-inches, inches, axes.figure.dpi_scale_trans)
        place = {"transform": axes.transData + shift}
        axes.plot(rows["n"], rows["value"], lw=STEP, marker="o", ms=2.2, **look, **place)
        band = {"color": look["color"], "alpha": 0.14, "linewidth": 0}
        axes.fill_between(rows["n"], rows["low"], rows["high"], **band, **place)
    sizes = pd.concat([rows["n"] for rows, _ in curves])
    axes.set(xscale="log", xlabel="trajectories n", ylabel="best discount γ")
    axes.set(xlim=(sizes.min() / 2, 2 * sizes.max()), ylim=(-0.07, 1.06))
    axes.xaxis.minorticks_off()


def power_of_horizon(slopes: pd.Series, gamma: float) -> str:
    """Return the power of T as which the variance grows at a discount, for a title."""
    return rf"$\mathbf{{T^{{{slopes[gamma]:.1f}}}}}$ (γ = {gamma:g})"


def label_horizons(axes: Any, curve: pd.DataFrame) -> None:
    """Label the horizons of a curve on a logarithmic axis, every second one if they are many."""
    horizons = sorted(curve["horizon"].unique())
    axes.set_xscale("log", base=2)
    shown = horizons[(len(horizons) - 1) % 2 :: 2] if len(horizons) > 4 else horizons
    axes.set_xticks(shown, [f"{t:g}" for t in shown])
    axes.set_xlabel("horizon T (tokens)")
