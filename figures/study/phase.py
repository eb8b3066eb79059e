"""The discount with the smallest error by batch size and KL of a response, and where a run lies."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style
from figures.registry import read_table, table_path

COLUMNS = ("quantity", "estimator", "horizon", "cost", "n", "value", "low", "high")
CAPTION = (
    "Color: discount with the smallest squared error (median over random tabular worlds) by "
    "trajectories in a batch and KL of a response. White line with its interval: the batch size "
    "from which all later costs (γ = 1) have a smaller error than none (γ = 0). Sampled as is, "
    "that batch size grows with the horizon at equal KL; with mean costs and a value baseline it "
    "depends on neither. Points: gradient probes of a run, with the 95 % interval of its KL over "
    "prompts, filled with the discount that the run's own gradients recommend. Blank: outside the "
    "study."
)
NAMES = {
    "plain": "as sampled",
    "position_value": "mean credit at the position",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw four maps: as sampled with short and long responses, and two variance reductions."""
    best = table[table["quantity"] == "best_gamma"]
    runs = table[table["quantity"] == "run"]
    short, long = best["horizon"].min(), best["horizon"].max()
    kinds = [("plain", short), ("plain", long), ("position_value", long), ("rb_all_value", long)]
    grid = [0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0]
    colours = ListedColormap(style.sequential_colors(len(grid)))
    steps = BoundaryNorm(cell_edges(grid), len(grid))
    figure, axes = style.make_panels(2, 2, 4.8, width=width)
    for ax, (name, horizon) in zip(axes, kinds, strict=True):
        map_rows = best[(best["estimator"] == name) & (best["horizon"] == horizon)]
        cells = map_rows.pivot(index="cost", columns="n", values="value")
        x, y = (np.exp(cell_edges(np.log(v.to_numpy(float)))) for v in (cells.columns, cells.index))
        ax.pcolormesh(x, y, cells.to_numpy(), cmap=colours, norm=steps, linewidth=0)
        draw_crossover(ax, table, name, horizon)
        draw_runs(ax, runs, colours, steps)
        ax.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
        ax.set(xlabel="trajectories n", ylabel="KL of a response, nats")
        ax.set_title(f"{NAMES[name]}, {horizon:g} tokens")
        ax.grid(False)
    mappable = mpl.cm.ScalarMappable(norm=steps, cmap=colours)
    colorbar = figure.colorbar(mappable, ax=axes, ticks=grid, spacing="uniform", shrink=0.8)
    colorbar.set_label("best discount γ")
    if len(runs):
        figure.suptitle(recommendation(runs.iloc[-1]), fontsize=8)
    return figure


def cell_edges(middles: Any) -> np.ndarray:
    """Return the (k + 1,) edges of cells around k ascending centers, halfway between them."""
    m = np.asarray(middles, dtype=float)
    half = (m[1:] + m[:-1]) / 2
    return np.concatenate([[2 * m[0] - half[0]], half, [2 * m[-1] - half[-1]]])


def draw_crossover(axes: Any, table: pd.DataFrame, name: str, horizon: float) -> None:
    """Draw the batch size from which γ = 1 has a smaller error than γ = 0, with its interval."""
    selected = (table["quantity"] == "overtaking_batch") & (table["estimator"] == name)
    rows = table[selected & (table["horizon"] == horizon)].sort_values("cost")
    axes.plot(rows["value"], rows["cost"], color="white", lw=1.2)
    for end in ("low", "high"):
        axes.plot(rows[end], rows["cost"], ":", color="white", lw=0.8)


def draw_runs(axes: Any, runs: pd.DataFrame, colours: Any, steps: Any) -> None:
    """Draw the probes of a run as points, colored by the discount that they recommend."""
    for _, row in runs.iterrows():
        axes.plot([row["n"]] * 2, [row["low"], row["high"]], color="black", lw=1)
        fill = colours(steps(row["value"]))
        axes.plot(row["n"], row["cost"], "o", ms=6, mfc=fill, mec="black", zorder=5)


def recommendation(row: pd.Series) -> str:
    """Describe what the last probe of a run recommends for its own batch."""
    return (
        f"{row['estimator']}, step {row['step']:g}: {row['n']:g} sequences of {row['horizon']:.0f} "
        f"tokens and {row['cost']:.3g} nats\nsmallest error by its own gradients: {row['chosen']} "
        "at "
        f"γ = {row['value']:g}, best in {row['share']:.0%} of resamplings"
    )


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
