"""Where a run stands: the discount of least error by batch size and KL of a response."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style
from figures.registry import read_table, recorded

COLUMNS = ("quantity", "estimator", "horizon", "cost", "n", "value", "low", "high")
CAPTION = (
    "Colour: discount of least squared error, median over random tabular worlds, by trajectories "
    "in a batch and KL of a response. White line, with its interval: the batch from which the "
    "whole future (γ = 1) errs less than none (γ = 0). Sampled as is, that batch grows with the "
    "horizon at equal KL; with mean costs and a value baseline it depends on neither. Points: "
    "probes of a run, with the 95 % interval of its KL over prompts, filled with the discount that "
    "the run's own gradients ask for. Blank: outside of the study."
)
NAMES = {
    "plain": "as sampled",
    "position_value": "mean credit at the position",
    "rb_all_value": "mean costs, value baseline",
}


def draw(table: pd.DataFrame) -> Figure:
    """Four maps: as sampled with short and long responses, and two reductions of noise."""
    best = table[table["quantity"] == "best_gamma"]
    runs = table[table["quantity"] == "run"]
    short, long = best["horizon"].min(), best["horizon"].max()
    kinds = [("plain", short), ("plain", long), ("position_value", long), ("rb_all_value", long)]
    grid = [0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0]
    colours = ListedColormap(style.shades(len(grid)))
    steps = BoundaryNorm(edges(grid), len(grid))
    figure, axes = style.panels(2, 2, 4.8)
    for place, (name, horizon) in zip(axes, kinds, strict=True):
        mine = best[(best["estimator"] == name) & (best["horizon"] == horizon)]
        cells = mine.pivot(index="cost", columns="n", values="value")
        x, y = (np.exp(edges(np.log(v.to_numpy(float)))) for v in (cells.columns, cells.index))
        place.pcolormesh(x, y, cells.to_numpy(), cmap=colours, norm=steps, linewidth=0)
        overtakes(place, table, name, horizon)
        points(place, runs, colours, steps)
        place.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
        place.set(xlabel="trajectories n", ylabel="KL of a response, nats")
        place.set_title(f"{NAMES[name]}, {horizon:g} tokens")
        place.grid(False)
    bar = mpl.cm.ScalarMappable(norm=steps, cmap=colours)
    shown = figure.colorbar(bar, ax=axes, ticks=grid, spacing="uniform", shrink=0.8)
    shown.set_label("discount of least error")
    if len(runs):
        figure.suptitle(verdict(runs.iloc[-1]), fontsize=8)
    return figure


def edges(middles: Any) -> np.ndarray:
    """(k + 1,) ends of cells around k rising middles, halfway between them."""
    m = np.asarray(middles, dtype=float)
    half = (m[1:] + m[:-1]) / 2
    return np.concatenate([[2 * m[0] - half[0]], half, [2 * m[-1] - half[-1]]])


def overtakes(axes: Any, table: pd.DataFrame, name: str, horizon: float) -> None:
    chosen = (table["quantity"] == "overtaking_batch") & (table["estimator"] == name)
    rows = table[chosen & (table["horizon"] == horizon)].sort_values("cost")
    axes.plot(rows["value"], rows["cost"], color="white", lw=1.2)
    for end in ("low", "high"):
        axes.plot(rows[end], rows["cost"], ":", color="white", lw=0.8)


def points(axes: Any, runs: pd.DataFrame, colours: Any, steps: Any) -> None:
    for _, row in runs.iterrows():
        axes.plot([row["n"]] * 2, [row["low"], row["high"]], color="black", lw=1)
        fill = colours(steps(row["value"]))
        axes.plot(row["n"], row["cost"], "o", ms=6, mfc=fill, mec="black", zorder=5)


def verdict(row: pd.Series) -> str:
    """What the last probe of a run recommends for its own batch."""
    return (
        f"{row['estimator']}, step {row['step']:g}: {row['n']:g} sequences of {row['horizon']:.0f} "
        f"tokens and {row['cost']:.3g} nats\nleast error by its own gradients: {row['chosen']} at "
        f"γ = {row['value']:g}, best in {row['share']:.0%} of resamplings"
    )


def collect(runs: list[Path]) -> pd.DataFrame:
    """The recorded maps, and the probes of runs with --probe-every as points.

    A point's value is the discount of least error that was measured, its low and high those of
    `cost`; `chosen` is the member most often the best under the sampling error, share the smaller
    of how often that member and that discount were.

    Raises:
      ValueError: none of the runs has a probe that knows the interval of its cost.
    """

    from diagnostics.records.run_folders import recorded_rows

    found = []
    for run in runs:
        for row in recorded_rows(run):
            if row.get("gradient/cost_of_response_low") is None:
                continue
            members = {
                name.removeprefix("gradient/chosen/"): share
                for name, share in row.items()
                if name.startswith("gradient/chosen/")
            }
            chosen, gamma = max(members, key=lambda x: members[x]), row["gradient/best_gamma"]
            found.append(
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
                    "chosen": chosen,
                    "share": min(members[chosen], row[f"gradient/chosen@{gamma:g}"]),
                }
            )
    if not found:
        raise InvalidInput(
            f"no gradient probe in {[str(r) for r in runs]}; train with --probe-every"
        )
    study = read_table(recorded("phase"))
    return pd.concat([study, pd.DataFrame(found)], ignore_index=True)
