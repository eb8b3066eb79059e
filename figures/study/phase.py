"""The discount with the smallest error by batch size and KL of a response, and where a run lies."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from diagnostics.errors import InvalidInput
from figures import style
from figures.registry import read_table, table_path
from figures.study.estimators import estimator_name, estimator_title

COLUMNS = ("quantity", "estimator", "horizon", "cost", "n", "value", "low", "high")
CAPTION = (
    "Color: discount γ of later costs with the smallest squared error of the gradient of the "
    "sequence KL (median over random tabular worlds), by trajectories in a batch and KL of a "
    "response. White line with its dotted 95 % interval: the batch size from which all later costs "
    "(γ = 1) have a smaller error than none (γ = 0); its point at 1 nat is labelled. Mean "
    "costs: costs are replaced by their means over tokens. Points: gradient probes of a run, with "
    "the 95 % interval of its KL over prompts, filled with the discount that the run's own "
    "gradients recommend. Blank: outside the study."
)
GRID = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Discounts that are compared."""
LABELLED = 1.0
"""KL in nats at which the white line is labelled."""
WHITE: dict[str, Any] = {
    "color": "white",
    "path_effects": [withStroke(linewidth=2.4, foreground="#333333")],
}
"""Options of the white line, outlined to be seen on light colors."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw four maps: as sampled with short and long responses, and two variance reductions."""
    column = style.is_column(width)
    best = table[table["quantity"] == "best_gamma"]
    runs = table[table["quantity"] == "run"]
    short, long = best["horizon"].min(), best["horizon"].max()
    kinds = [("plain", short), ("plain", long), ("position_value", long), ("rb_all_value", long)]
    colors = ListedColormap(style.sequential_colors(len(GRID)))
    edges = cell_edges(GRID)
    steps = BoundaryNorm(edges, len(GRID))
    height = (5.2 if column else 5.4) + (0.7 if len(runs) else 0)
    figure, axes = style.make_panels(2, 2, height, width=width)
    for ax, (name, horizon) in zip(axes, kinds, strict=True):
        draw_map(
            ax, best[(best["estimator"] == name) & (best["horizon"] == horizon)], colors, steps
        )
        draw_crossover(ax, table, name, horizon)
        draw_runs(ax, runs, colors, steps)
        title = f"{estimator_title(name)}, {horizon:g} tokens"
        ax.set_title(title.replace(", ", ",\n") if column else title)
        ax.label_outer()
    mappable = mpl.cm.ScalarMappable(norm=steps, cmap=colors)
    place = {"location": "bottom", "aspect": 24, "pad": 0.02} if column else {"shrink": 0.9}
    colorbar = figure.colorbar(mappable, ax=axes, spacing="uniform", **place)
    colorbar.set_ticks((edges[1:] + edges[:-1]) / 2, labels=[f"{gamma:g}" for gamma in GRID])
    colorbar.set_label("best discount γ")
    colorbar.ax.tick_params(labelsize=7)
    add_legend(figure, len(runs) > 0)
    if len(runs):
        figure.suptitle(recommendation(runs.iloc[-1], wrap=50 if column else 104), fontsize=8)
    return figure


def draw_map(axes: Any, rows: pd.DataFrame, colors: Any, steps: Any) -> None:
    """Draw the best discount as the color of a cell of batch size and KL."""
    cells = rows.pivot(index="cost", columns="n", values="value")
    x, y = (np.exp(cell_edges(np.log(v.to_numpy(float)))) for v in (cells.columns, cells.index))
    axes.pcolormesh(x, y, cells.to_numpy(), cmap=colors, norm=steps, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
    axes.set(xlabel="trajectories n", ylabel="KL of a response (nats)")
    axes.minorticks_off()
    axes.grid(visible=False)


def add_legend(figure: Figure, has_runs: bool) -> None:
    """Explain the lines, and the points if there are any."""
    handles = [
        Line2D([], [], lw=1.2, label="right of it, γ = 1 beats γ = 0", **WHITE),
        Line2D([], [], lw=1, ls=":", color="white", label="95 % interval"),
    ]
    if has_runs:
        look: dict[str, Any] = {"color": "black", "mfc": "white", "lw": 1}
        handles.append(Line2D([], [], marker="o", ms=5, label="a run's probe", **look))
    frame = {"frameon": True, "facecolor": "#31688E", "labelcolor": "white", "framealpha": 1}
    figure.legend(handles=handles, loc="outside lower center", ncols=2, **frame)


def cell_edges(middles: Any) -> np.ndarray:
    """Return the (k + 1,) edges of cells around k ascending centers, halfway between them."""
    m = np.asarray(middles, dtype=float)
    half = (m[1:] + m[:-1]) / 2
    return np.concatenate([[2 * m[0] - half[0]], half, [2 * m[-1] - half[-1]]])


def crossovers(table: pd.DataFrame, name: str, horizon: float) -> pd.DataFrame:
    """Return the batch sizes from which γ = 1 has a smaller error than γ = 0, by KL."""
    selected = (table["quantity"] == "overtaking_batch") & (table["estimator"] == name)
    return table[selected & (table["horizon"] == horizon)].sort_values("cost")


def draw_crossover(axes: Any, table: pd.DataFrame, name: str, horizon: float) -> None:
    """Draw the batch size from which γ = 1 has a smaller error than γ = 0, with its interval."""
    rows = crossovers(table, name, horizon)
    axes.plot(rows["value"], rows["cost"], lw=1.2, **WHITE)
    for end in ("low", "high"):
        axes.plot(rows[end], rows["cost"], ":", lw=1, color="white")
    for _, row in rows[rows["cost"] == LABELLED].iterrows():
        axes.plot(row["value"], row["cost"], "o", ms=3, **WHITE)
        place = {"textcoords": "offset points", "xytext": (-5, 0), "ha": "right", "va": "center"}
        text = f"n = {float(format(row['value'], '.2g')):,.0f}"
        axes.annotate(text, (row["value"], row["cost"]), fontsize=7, **place, **WHITE)


def draw_runs(axes: Any, runs: pd.DataFrame, colors: Any, steps: Any) -> None:
    """Draw the probes of a run as points, colored by the discount that they recommend."""
    for _, row in runs.iterrows():
        axes.plot([row["n"]] * 2, [row["low"], row["high"]], color="black", lw=1)
        fill = colors(steps(row["value"]))
        axes.plot(row["n"], row["cost"], "o", ms=6, color="black", mfc=fill, zorder=5)


def recommendation(row: pd.Series, wrap: int = 104) -> str:
    """Describe what the last probe of a run recommends for its own batch.

    Args:
        row: Row of the probe.
        wrap: Largest number of characters of a line.

    Returns:
        Lines of text.
    """
    probe = (
        f"{row['estimator']}, step {row['step']:g}: {row['n']:g} sequences of {row['horizon']:.0f} "
        f"tokens and {row['cost']:.3g} nats"
    )
    advice = (
        f"smallest error by its own gradients: {estimator_name(row['chosen'])} at "
        f"γ = {row['value']:g}, best in {100 * row['share']:.0f} % of resamplings"
    )
    return "\n".join(textwrap.fill(line, wrap) for line in (probe, advice))


def collect(runs: list[Path]) -> pd.DataFrame:
    """Combine the recorded maps with the gradient probes of runs.

    Args:
        runs: Folders of runs with --probe-every.

    Returns:
        The table of the study with one row more a probe: value is the discount with the smallest
        measured error; low and high are the interval of `cost`; `chosen` is the estimator that is
        most often the best under the sampling error, and share the smaller of how often that
        estimator and that discount are the best.

    Raises:
        InvalidInput: No run has a probe with an interval of its cost.
    """
    from diagnostics.records.run_folder import RunFolder

    points = []
    for run in runs:
        for row in RunFolder(run).rows():
            if row.get("gradient/cost_of_response_low") is None:
                continue
            selection_shares = {
                name.removeprefix("gradient/chosen/"): share
                for name, share in row.items()
                if name.startswith("gradient/chosen/")
            }
            estimator, gamma = (
                max(selection_shares, key=lambda x: selection_shares[x]),
                row["gradient/best_gamma"],
            )
            points.append(
                {
                    "quantity": "run",
                    "estimator": run.name,
                    "horizon": row["response/length"],
                    "cost": row["gradient/cost_of_response"],
                    "n": row["gradient/sequences"],
                    "value": gamma,
                    "low": row["gradient/cost_of_response_low"],
                    "high": row["gradient/cost_of_response_high"],
                    "step": row["step"],
                    "chosen": estimator,
                    "share": min(selection_shares[estimator], row[f"gradient/chosen@{gamma:g}"]),
                }
            )
    if not points:
        raise InvalidInput(
            f"no gradient probe in {[str(r) for r in runs]}; train with --probe-every"
        )
    study = read_table(table_path("phase"))
    return pd.concat([study, pd.DataFrame(points)], ignore_index=True)
