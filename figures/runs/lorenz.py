"""Lorenz curves: how few tokens carry the signal, and how few the update."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "step", "quantity", "tokens", "value", "low", "high")
CAPTION = (
    "Lorenz curves read from the top: the share of the whole that the largest tokens hold, for the "
    "signal |r| = |log p(y) − log q(y)| and for the size of the update, |r| |1_y − p|. Dashed: "
    "first saved batch, solid: last one. Dots: the top 1 % of the tokens. Bands: 95 %, bootstrap "
    "over prompts. Grey: all tokens alike."
)
GRID = np.unique(np.concatenate([[0.01], np.geomspace(5e-4, 1, 40).round(6)]))
"""Shares of the tokens, largest first."""
QUANTITIES = {"signal": "Signal |r|", "update": "Size of the update, |r| |1_y − p|"}


def draw(table: pd.DataFrame) -> Figure:
    """Two panels; a colour a method, dashed at its first step and solid at its last."""
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = style.panels(1, 2, 2.9)
    for place, (quantity, title) in zip(axes, QUANTITIES.items(), strict=True):
        rows = table[table["quantity"] == quantity]
        for method, colour in zip(methods, style.CYCLE * len(methods), strict=False):
            curves(place, rows[rows["method"] == method], method, colour)
        place.plot(GRID, GRID, color=style.GREY, lw=1, zorder=1)
        place.axvline(0.01, color="black", lw=0.6, ls=":")
        place.set(xscale="log", xlabel="share of the tokens, largest first", ylim=(0, 1.01))
        place.set_xticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "all"])
        place.set_title(title)
    axes[0].set_ylabel("share of the whole that they hold")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def curves(axes: Any, rows: pd.DataFrame, method: str, colour: str) -> None:
    """The curve of a method at its first step and at its last, with the top 1 % marked."""
    steps = sorted(rows["step"].unique())
    for step, dash in zip((steps[0], steps[-1]), ("--", "-"), strict=True):
        at = rows[rows["step"] == step].sort_values("tokens")
        label = f"{method}, step {step:g}"
        x = at["tokens"].to_numpy()
        style.curve(axes, x, at["value"], at["low"], at["high"], color=colour, ls=dash, label=label)
        one = at[at["tokens"] == 0.01]
        fill = colour if dash == "-" else "white"
        axes.plot(one["tokens"], one["value"], "o", ms=4, color=colour, mfc=fill, zorder=4)
        if steps[0] == steps[-1]:
            break


def collect(runs: list[Path]) -> pd.DataFrame:
    """Curves at the first and the last step that all runs of a method saved."""
    from diagnostics.records.run_folders import methods, saved, short
    from figures.collect.tokens import tokens

    rows, generator = [], np.random.default_rng(0)
    for method, mine in methods(runs).items():
        steps = saved(mine)
        for step in sorted({steps[0], steps[-1]}):
            data = tokens(mine, step)
            sizes = {"signal": data["cost"].abs(), "update": data["energy"] ** 0.5}
            for quantity, x in sizes.items():
                bands = curve(x.to_numpy(float), data["cluster"].to_numpy(), generator)
                for share, *band in zip(GRID, *bands, strict=True):
                    value, low, high = map(short, band)
                    about = {"method": method, "runs": len(mine), "step": step}
                    about |= {"quantity": quantity, "tokens": share}
                    rows.append(about | {"value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def curve(
    x: np.ndarray, cluster: np.ndarray, generator: np.random.Generator, resamples: int = 400
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of sum x that the largest tokens hold, at every share of the tokens in GRID.

    A share that cuts a token takes that part of it. x (N,) nonnegative; cluster (N,) numbers from
    0. Returns value, low and high, (len(GRID),) each: a 95 % bootstrap over clusters.
    """
    order = np.argsort(-x, kind="stable")
    x, cluster = x[order], cluster[order]
    count = int(cluster.max()) + 1

    def held(weight: np.ndarray) -> np.ndarray:
        tokens, total = np.cumsum(weight), np.cumsum(weight * x)
        ends = np.concatenate([[0.0], tokens / tokens[-1]])
        return np.interp(GRID, ends, np.concatenate([[0.0], total / total[-1]]))

    drawn = [
        held(np.bincount(generator.integers(count, size=count), minlength=count)[cluster])
        for _ in range(resamples)
    ]
    low, high = np.quantile(np.stack(drawn), [0.025, 0.975], axis=0)
    return held(np.ones(len(x))), low, high
