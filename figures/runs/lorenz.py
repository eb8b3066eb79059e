"""Lorenz curves: how concentrated the signal and the update are on few tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "step", "quantity", "tokens", "value", "low", "high")
CAPTION = (
    "Lorenz curves: share of the total that the largest tokens have, of the signal |r| = |log "
    "p(y) − log q(y)| (left) and of the size of the update, |r| |1_y − p| (right). Dashed: first "
    "saved batch; solid: last. Dots: the top 1 % of the tokens. Bands: 95 % bootstrap intervals "
    "over prompts. Grey: all tokens equal."
)
TOKEN_SHARES = np.unique(np.concatenate([[0.01], np.geomspace(5e-4, 1, 40).round(6)]))
"""Shares of the tokens, largest first."""
QUANTITIES = {"signal": "Signal |r|", "update": "Size of the update, |r| |1_y − p|"}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a quantity and one color a method; first step dashed, last step solid."""
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = style.make_panels(1, 2, 2.9, width=width)
    for ax, (quantity, title) in zip(axes, QUANTITIES.items(), strict=True):
        rows = table[table["quantity"] == quantity]
        for method, colour in zip(methods, style.CYCLE * len(methods), strict=False):
            draw_curves(ax, rows[rows["method"] == method], method, colour)
        ax.plot(TOKEN_SHARES, TOKEN_SHARES, color=style.GREY, lw=1, zorder=1)
        ax.axvline(0.01, color="black", lw=0.6, ls=":")
        ax.set(xscale="log", xlabel="share of the tokens, largest first", ylim=(0, 1.01))
        ax.set_xticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "all"])
        ax.set_title(title)
    axes[0].set_ylabel("share of the total")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def draw_curves(axes: Any, rows: pd.DataFrame, method: str, colour: str) -> None:
    """Draw the curves of a method at its first and last step, and mark the top 1 %."""
    steps = sorted(rows["step"].unique())
    for step, dash in zip((steps[0], steps[-1]), ("--", "-"), strict=True):
        step_rows = rows[rows["step"] == step].sort_values("tokens")
        label = f"{method}, step {step:g}"
        x = step_rows["tokens"].to_numpy()
        style.plot_band(
            axes,
            x,
            step_rows["value"],
            step_rows["low"],
            step_rows["high"],
            color=colour,
            ls=dash,
            label=label,
        )
        top_percent = step_rows[step_rows["tokens"] == 0.01]
        fill = colour if dash == "-" else "white"
        axes.plot(
            top_percent["tokens"], top_percent["value"], "o", ms=4, color=colour, mfc=fill, zorder=4
        )
        if steps[0] == steps[-1]:
            break


def collect(runs: list[Path]) -> pd.DataFrame:
    """Compute curves at the first and the last step that all runs of a method saved.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.
    """
    from diagnostics.records.run_groups import common_saved_steps, group_by_method
    from diagnostics.stats import round_significant
    from figures.collect.tokens import token_table

    rows, generator = [], np.random.default_rng(0)
    for method, method_runs in group_by_method(runs).items():
        steps = common_saved_steps(method_runs)
        for step in sorted({steps[0], steps[-1]}):
            data = token_table(method_runs, step)
            sizes = {"signal": data["cost"].abs(), "update": data["energy"] ** 0.5}
            for quantity, x in sizes.items():
                bands = lorenz_curve(x.to_numpy(float), data["cluster"].to_numpy(), generator)
                for share, *band in zip(TOKEN_SHARES, *bands, strict=True):
                    value, low, high = map(round_significant, band)
                    labels = {"method": method, "runs": len(method_runs), "step": step}
                    labels |= {"quantity": quantity, "tokens": share}
                    rows.append(labels | {"value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def lorenz_curve(
    x: np.ndarray, cluster: np.ndarray, generator: np.random.Generator, resamples: int = 400
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the share of sum x that the largest tokens have, at every share of the tokens.

    A token that is cut by a share counts in proportion.

    Args:
        x: (N,) nonnegative values.
        cluster: (N,) cluster numbers from 0.
        generator: Random generator of the bootstrap.
        resamples: Number of bootstrap resamples.

    Returns:
        value, low and high at TOKEN_SHARES, with a 95 % bootstrap interval over clusters.
    """
    order = np.argsort(-x, kind="stable")
    x, cluster = x[order], cluster[order]
    count = int(cluster.max()) + 1

    def cumulative_share(weight: np.ndarray) -> np.ndarray:
        tokens, total = np.cumsum(weight), np.cumsum(weight * x)
        ends = np.concatenate([[0.0], tokens / tokens[-1]])
        return np.interp(TOKEN_SHARES, ends, np.concatenate([[0.0], total / total[-1]]))

    samples = [
        cumulative_share(
            np.bincount(generator.integers(count, size=count), minlength=count)[cluster]
        )
        for _ in range(resamples)
    ]
    low, high = np.quantile(np.stack(samples), [0.025, 0.975], axis=0)
    return cumulative_share(np.ones(len(x))), low, high
