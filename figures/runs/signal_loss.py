"""Gradient signal against remaining loss: does the gradient vanish before the divergence does?"""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from diagnostics.errors import InvalidInput
from figures import style
from figures.labels import method_label

COLUMNS = ("method", "runs", "run", "step", "loss", "loss_error", "signal", "low", "high", "ratio")
CAPTION = (
    "Does the gradient vanish before the divergence does? One panel a method, on common axes: "
    "|G|², the squared norm of the mean sampled-token gradient of the output layer (LM head), "
    "against the remaining reverse KL (mean of log p - log q per token of the student). |G|² is "
    "an unbiased estimate to which minibatch noise does not add. One point a probe, one trail a "
    "run, from the first probe (open) to the last (filled); whiskers: 95 % intervals over "
    "prompts; triangles: the interval reaches 0 (an estimate below 0 is drawn at the lower edge). "
    "Learning-signal ratio: |G|² / 2 KL by step, with the same intervals and triangles. A run "
    "that learns moves down and to the left. A run that does not keeps its KL: it moves down if "
    "the signal vanishes, and up if its own objective does not follow the signal. Output layer "
    "only: other layers may still learn."
)
SHIFT = 0.012
"""Horizontal distance of the methods' intervals in the ratio, as a share of the steps."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the signal against the reverse KL, one panel a method, and their ratio by step."""
    methods = list(dict.fromkeys(table["method"]))
    colours = dict(zip(methods, style.CYCLE * len(methods), strict=False))
    num_columns = min(len(methods), 2 if style.is_column(width) else 3)
    num_rows = -(-len(methods) // num_columns)
    row_height = 1.6 if style.is_column(width) else 2.1
    height = min(style.MAX_HEIGHT, row_height * (num_rows + 1) + 0.6)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(num_rows + 1, num_columns)
    floor = table.loc[table["signal"] > 0, "signal"].min() / 3
    trails: list[Any] = []
    for i, method in enumerate(methods):
        shared = trails[0] if trails else None
        place = grid[i // num_columns, i % num_columns]
        axes = figure.add_subplot(place, sharex=shared, sharey=shared)
        trails.append(axes)
        rows = table[table["method"] == method]
        for _, run_rows in rows.groupby("run"):
            draw_trail(axes, run_rows.sort_values("step"), colours[method], floor)
        title = panel_title(rows, 17 if style.is_column(width) else 24)
        axes.set_title(title, color=colours[method])
    set_trail_axes(trails, num_columns, floor)
    draw_ratios(figure.add_subplot(grid[num_rows, :]), table, colours)
    add_legend(figure, 2 if style.is_column(width) else 4)
    return figure


def panel_title(rows: pd.DataFrame, line_length: int) -> str:
    """Return a method, and its mean KL at the first and the last probe."""
    method = method_label(rows["method"].iloc[0])
    ends = [
        rows.loc[rows["step"] == x, "loss"].mean() for x in (rows["step"].min(), rows["step"].max())
    ]
    label = textwrap.fill(method, line_length, break_on_hyphens=False)
    return f"{label}\nKL {ends[0]:.2g} to {ends[1]:.2g} nats"


def set_trail_axes(trails: list[Any], num_columns: int, floor: float) -> None:
    """Give the panels of the trails their common axes, with labels at the left and below."""
    for i, axes in enumerate(trails):
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        if i % num_columns == 0:
            axes.set_ylabel("signal |G|²")
        else:
            axes.tick_params(labelleft=False)
        if i + num_columns >= len(trails):
            axes.set_xlabel("reverse KL, nats")
        else:
            axes.tick_params(labelbottom=False)
    trails[0].set_ylim(0.8 * floor, None)


def draw_trail(axes: Any, rows: pd.DataFrame, colour: str, floor: float) -> None:
    """Draw the probes of one run; an estimate that is not positive is drawn at the floor."""
    x, y = rows["loss"].to_numpy(), rows["signal"].clip(lower=floor).to_numpy()
    axes.plot(x, y, color=colour, lw=1)
    fill = np.linspace(0.05, 1, len(rows))
    for i, (_, row) in enumerate(rows.iterrows()):
        low, high = max(row["low"], floor), max(row["high"], floor)
        whisker: dict[str, Any] = {"color": colour, "lw": 0.6, "alpha": 0.5}
        axes.plot([x[i]] * 2, [low, high], **whisker)
        half_width = 1.96 * row["loss_error"]
        axes.plot([max(x[i] - half_width, x[i] / 3), x[i] + half_width], [y[i]] * 2, **whisker)
        if row["low"] <= 0:
            axes.plot(x[i], floor * 1.15, "v", ms=3, color=colour)
        axes.plot(x[i], y[i], "o", ms=4, color=colour, mfc="white", zorder=4)
        axes.plot(x[i], y[i], "o", ms=3.5, color=colour, mew=0, alpha=fill[i], zorder=5)


def draw_ratios(axes: Any, table: pd.DataFrame, colours: dict[str, str]) -> None:
    """Draw every run's ratio by step, the methods' intervals beside each other."""
    positive = table.loc[table["ratio"] > 0, "ratio"]
    floor = positive.min() / 3 if len(positive) else 1e-3
    width = table["step"].max() - table["step"].min()
    for i, (method, colour) in enumerate(colours.items()):
        shift = SHIFT * width * (i - (len(colours) - 1) / 2)
        for _, rows in table[table["method"] == method].groupby("run"):
            draw_ratio(axes, rows.sort_values("step"), colour, shift, floor)
    axes.set(yscale="log", xlabel="step", ylabel="|G|² / 2 KL")
    axes.set_ylim(bottom=0.8 * floor)
    axes.set_title("Learning-signal ratio")


def draw_ratio(axes: Any, rows: pd.DataFrame, colour: str, shift: float, floor: float) -> None:
    """Draw one run's ratio by step with the interval of the signal, moved by `shift`."""
    half = 2 * rows["loss"]
    x, value = rows["step"] + shift, rows["ratio"].clip(lower=floor)
    low, high = (rows["low"] / half).clip(lower=floor), (rows["high"] / half).clip(lower=floor)
    axes.vlines(x, low, high, color=colour, lw=0.8, alpha=0.5)
    axes.plot(x, value, color=colour, lw=1.2, marker="o", ms=3)
    at_zero = x[rows["low"] <= 0]
    axes.plot(at_zero, [floor] * len(at_zero), "v", ms=3, color=colour)


def add_legend(figure: Figure, num_columns: int) -> None:
    """Explain the marks below the panels; the colors are those of the panels' titles."""
    grey: dict[str, Any] = {"color": "#555555"}
    handles = [
        Line2D([], [], marker="o", ls="", mfc="white", label="first probe", **grey),
        Line2D([], [], marker="o", ls="", label="last probe", **grey),
        Line2D([], [], lw=0.8, alpha=0.7, label="95 % interval", **grey),
        Line2D([], [], marker="v", ls="", ms=4, label="interval reaches 0", **grey),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=num_columns)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Collect the gradient probes of runs with --probe-every.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.

    Raises:
        InvalidInput: No run has a probe.
    """
    from diagnostics.records.run_folder import RunFolder
    from diagnostics.records.run_groups import group_by_method
    from diagnostics.stats import round_significant

    records = []
    for method, method_runs in group_by_method(runs).items():
        for run in method_runs:
            for row in RunFolder(run).rows():
                if row.get("gradient/signal") is None:
                    continue
                loss, signal = row["divergence/reverse_kl"], row["gradient/signal"]
                values = {
                    "loss": loss,
                    "loss_error": row["divergence/reverse_kl_se"],
                    "signal": signal,
                }
                values |= {end: row[f"gradient/signal_{end}"] for end in ("low", "high")}
                values["ratio"] = signal / (2 * loss)
                labels = {
                    "method": method,
                    "runs": len(method_runs),
                    "run": run.name,
                    "step": row["step"],
                }
                records.append(labels | {k: round_significant(v) for k, v in values.items()})
    if not records:
        raise InvalidInput(
            f"no gradient probe in {[str(r) for r in runs]}; train with --probe-every"
        )
    return pd.DataFrame(records)
