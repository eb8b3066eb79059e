"""Lorenz curves: how concentrated the signal and the update are on few tokens."""

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.labels import method_label

COLUMNS = ("method", "runs", "step", "quantity", "tokens", "value", "low", "high")
CAPTION = (
    "How concentrated is the signal on few tokens? Lorenz curves of each method: share of the "
    "total that the largest tokens have, of the signal |r| = |log p(y) − log q(y)| and of the size "
    "of the update, |r| ‖1_y − p‖. Dashed: first saved batch; solid: last. Circles and titles: "
    "share of the largest 1 % of the tokens, from the first to the last saved batch. Bands: 95 % "
    "bootstrap intervals over prompts. Grey: all tokens equal."
)
TOKEN_SHARES = np.unique(np.concatenate([[0.01], np.geomspace(5e-4, 1, 40).round(6)]))
"""Shares of the tokens, largest first."""
QUANTITIES = {"signal": "share of |r|", "update": "share of update"}
FIRST_COLOR, LAST_COLOR, TOP_SHARE = style.RED, style.BLUE, 0.01
MAX_METHODS, MAX_COLUMN_METHODS, PANELS_IN_A_ROW = 12, 6, 4
TOP_STYLE: dict[str, Any] = {"marker": "o", "ls": "", "ms": 4, "mfc": "white", "zorder": 4}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw two panels a method, below each other on a page and beside each other in a column."""
    narrow = style.is_column(width)
    methods = list(dict.fromkeys(table["method"]))
    methods = methods[: MAX_COLUMN_METHODS if narrow else MAX_METHODS]
    columns = 2 if narrow else min(len(methods), PANELS_IN_A_ROW)
    rows = len(methods) if narrow else 2 * -(-len(methods) // max(1, columns))
    figure, axes = style.make_panels(
        rows, columns, 0.9 + (1.2 if narrow else 1.35) * rows, width=width
    )
    used = []
    for i, method in enumerate(methods):
        for j, quantity in enumerate(QUANTITIES):
            row, column = (i, j) if narrow else (2 * (i // columns) + j, i % columns)
            ax = axes[row * columns + column]
            used.append(ax)
            selected = table[(table["method"] == method) & (table["quantity"] == quantity)]
            heading = fill(method_label(method), 18 if narrow else 22, break_on_hyphens=False)
            draw_panel(ax, selected, heading if j == 0 else "")
            ax.tick_params(labelleft=column == 0)
            if column == 0 or narrow:
                ax.set_ylabel(QUANTITIES[quantity])
            is_lowest = i + (1 if narrow else columns) >= len(methods) and (narrow or j == 1)
            ax.tick_params(labelbottom=is_lowest)
            ax.set_xlabel("share of the tokens,\nlargest first" if is_lowest else "")
    for ax in set(axes) - set(used):
        ax.set_axis_off()
    add_legend(figure, axes[0], table, narrow)
    return figure


def draw_panel(axes: Any, rows: pd.DataFrame, heading: str) -> None:
    """Draw the curves of a method at its first and last step; the title tells the top 1 %."""
    steps = sorted(rows["step"].unique())
    shares: list[str] = []
    for step in dict.fromkeys([*steps[-1:], *steps[:1]]):  # the dashed curve on top
        options: dict[str, Any] = {"color": LAST_COLOR}
        if step != steps[-1]:
            options = {"color": FIRST_COLOR, "ls": "--", "zorder": 3}
        curve = rows[rows["step"] == step].sort_values("tokens")
        x = curve["tokens"].to_numpy()
        style.plot_band(axes, x, curve["value"], curve["low"], curve["high"], **options)
        top = curve[curve["tokens"] == TOP_SHARE]
        axes.plot(top["tokens"], top["value"], color=options["color"], **TOP_STYLE)
        shares = [f"{100 * value:.0f}" for value in top["value"]] + shares
    axes.plot(TOKEN_SHARES, TOKEN_SHARES, color=style.GREY, lw=1, zorder=1)
    title = f"top 1 %: {' → '.join(shares)} %"
    axes.set_title(f"{heading}\n{title}".strip())
    axes.set(xscale="log", ylim=(0, 1.04), yticks=[0, 0.5, 1])
    axes.set_xticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "all"], fontsize=7)
    axes.minorticks_off()


def add_legend(figure: Figure, axes: Any, table: pd.DataFrame, narrow: bool) -> None:
    """Explain the curves and circles below the panels; `axes` are any to make handles with."""
    steps = table.groupby("method")["step"]
    curves = {}
    for name, step, options in (
        ("first", steps.min(), {"color": FIRST_COLOR, "ls": "--"}),
        ("last", steps.max(), {"color": LAST_COLOR}),
    ):
        number = f" (step {step.iloc[0]:g})" if step.min() == step.max() else ""
        curves[f"{name} saved batch{number}"] = axes.plot([], [], **options)[0]
    curves["largest 1 % of the tokens"] = axes.plot([], [], color="black", **TOP_STYLE)[0]
    curves["all tokens equal"] = axes.plot([], [], color=style.GREY, lw=1)[0]
    figure.legend(curves.values(), curves, loc="outside lower center", ncols=2 if narrow else 4)


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
