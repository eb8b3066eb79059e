"""The discount with the smallest error by batch size, and when later costs are worth including."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows
from figures.study.estimators import estimator_name

COLUMNS = ("quantity", "estimator", "distance", "n", "value", "low", "high")
CAPTION = (
    "Discount γ of later costs with the smallest mean squared error of the gradient of the "
    "sequence KL from n trajectories: by estimator, at a teacher whose logits differ by 1 (root "
    "mean square), and as sampled at teachers of several such distances; equal discounts are drawn "
    "side by side. And the n from which γ = 1 has a smaller error than γ = 0, by distance. The "
    "leave-one-out baseline has groups of 8. Medians over random tabular worlds, bands: 95 % "
    "bootstrap intervals."
)
ESTIMATORS = ("plain", "value", "leave_one_out", "rb_all_value")
LOOKS = {
    name: {"color": rows.ESTIMATOR_COLORS[name], "label": estimator_name(name)}
    for name in ESTIMATORS
}
DISTANCE = 1.0


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the best discount by estimator and by teacher distance, and the crossover batch size."""
    column = style.is_column(width)
    size = (3, 1, 6.0) if column else (1, 3, 3.2)
    figure, (estimator, distance, overtaking) = style.make_panels(*size, width=width)
    draw_by_estimator(estimator, table)
    draw_by_distance(distance, table)
    distance.legend(
        loc="lower right",
        title="distance",
        title_fontsize=7,
        handlelength=1,
        ncols=2 if column else 1,
        columnspacing=0.8,
    )
    draw_crossover(overtaking, table)
    handles, _ = estimator.get_legend_handles_labels()
    handles.append(rows.band_mark())
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if column else 5)
    return figure


def draw_by_estimator(axes: Any, table: pd.DataFrame) -> None:
    """Draw the best discount against batch size, one line an estimator."""
    curves = [
        (rows.select_rows(table, "best_gamma", "n", estimator=name, distance=DISTANCE), look)
        for name, look in LOOKS.items()
    ]
    rows.plot_best_discounts(axes, curves)
    raised = is_raised(curves)
    axes.set_title("Variance reduction raises\nthe best discount" if raised else "By estimator")


def is_raised(curves: list[rows.Curve]) -> bool:
    """Return whether no estimator has a lower best discount than the first one, at any n."""
    first = curves[0][0].set_index("n")["value"]
    return all((part.set_index("n")["value"] >= first).all() for part, _ in curves[1:])


def draw_by_distance(axes: Any, table: pd.DataFrame) -> None:
    """Draw the best discount against batch size, one line a distance of the teacher."""
    best = rows.select_rows(table, "best_gamma", "n", estimator=ESTIMATORS[0])
    distances = sorted(best["distance"].unique())
    colors = style.sequential_colors(len(distances))
    curves = [
        (best[best["distance"] == x], {"color": color, "label": f"{x:g}"})
        for x, color in zip(distances, colors, strict=True)
    ]
    rows.plot_best_discounts(axes, curves)
    lowered = is_raised(curves)
    axes.set_title("A near teacher lowers\nthe best discount" if lowered else "By teacher distance")


def draw_crossover(axes: Any, table: pd.DataFrame) -> None:
    """Draw the batch size from which γ = 1 has a smaller error than γ = 0, by teacher distance."""
    axes.set(xscale="log", yscale="log")
    curves = [
        (
            rows.select_rows(table, "overtaking_batch", "distance", estimator=name),
            look | {"marker": "o", "ms": 2.5},
        )
        for name, look in LOOKS.items()
    ]
    rows.plot_curves(axes, curves, "distance")
    distances = sorted(curves[0][0]["distance"])
    axes.set_xticks(distances, [f"{x:g}" for x in distances])
    axes.minorticks_off()
    axes.set(xlabel="distance of the teacher (logits)", ylabel="crossover n")
    ends = [float(f"{part.set_index('distance')['value'][DISTANCE]:.2g}") for part, _ in curves]
    axes.set_title(
        f"γ = 1 beats γ = 0 from n =\n{min(ends):,.0f} to {max(ends):,.0f} at distance {DISTANCE:g}"
    )
