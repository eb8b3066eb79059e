"""Training dynamics: accuracy, divergence and supervision during training runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.records.run_tables import training_table
from diagnostics.stats import problem_accuracies, share_interval
from figures import style

COLUMNS = ("run", "objective", "seed", "step", "metric", "value", "outcomes")
SMOOTHING_STEPS = 5
"""Window of the running mean in steps; the raw values are drawn faintly."""


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of rows and evaluations of runs, see `training_table`."""
    return training_table(runs)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw six panels; thin lines are runs, thick ones means over the seeds of an objective."""
    objectives = sorted(table["objective"].unique())
    colours = dict(zip(objectives, style.CYCLE * len(objectives), strict=False))
    figure, axes = style.make_panels(2, 3, 4.4, width=width)
    draw_accuracy(axes[0], table, colours)
    for ax, metric, title, scale in (
        (axes[1], "divergence/reverse_kl", "Reverse KL, nats per token", "log"),
        (axes[2], "grad_norm", "Gradient norm, unclipped", "log"),
        (axes[3], "signal/negative_share", "Tokens with negative signal", "linear"),
        (
            axes[4],
            "signal/signal_top1_share",
            "Signal in the top 1 % of tokens",
            "linear",
        ),
        (axes[5], "response/truncated_share", "Truncated responses", "linear"),
    ):
        draw_metric(ax, table, metric, colours)
        ax.set_title(title)
        ax.set(xlabel="optimizer step", yscale=scale)
    null = table[table["metric"] == "signal/negative_share_null"]
    if len(null):
        for objective, rows in null.groupby("objective"):
            mean = smooth(rows.groupby("step")["value"].mean())
            axes[3].plot(mean.index, mean, ":", color=colours[objective], lw=1)
        axes[3].plot([], [], ":", color="#444444", lw=1, label="expected from the two models")
        axes[3].legend(loc="best")
    return figure


def draw_accuracy(axes: Any, table: pd.DataFrame, colours: dict[str, str]) -> None:
    """Draw held-out accuracy with intervals over problems and seeds."""
    rows = table[table["metric"] == "eval/outcomes"]
    for objective, objective_rows in rows.groupby("objective"):
        points = []
        for step, group in objective_rows.groupby("step"):
            outcomes = np.stack([problem_accuracies(text) for text in group["outcomes"]])
            points.append((step, outcomes.mean(), *share_interval(outcomes)))
        count = objective_rows["seed"].nunique()
        label = f"{objective} ({count} seed{'s' if count > 1 else ''})"
        x, y, low, high = zip(*points, strict=True)
        style.plot_band(
            axes, x, y, low, high, color=colours[objective], marker="o", ms=3, label=label
        )
    axes.set_title("Held-out accuracy")
    axes.set(xlabel="optimizer step", ylim=(0, 1))
    axes.legend(loc="best")


def draw_metric(axes: Any, table: pd.DataFrame, metric: str, colours: dict[str, str]) -> None:
    """Draw the values of each run faintly, and the smoothed mean over the runs of an objective."""
    rows = table[table["metric"] == metric].dropna(subset=["value"])
    if rows.empty:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="#888888")
        return
    for (objective, _), run in rows.groupby(["objective", "run"]):
        axes.plot(run["step"], run["value"], color=colours[objective], lw=0.5, alpha=0.3)
    for objective, objective_rows in rows.groupby("objective"):
        mean = smooth(objective_rows.groupby("step")["value"].mean())
        axes.plot(mean.index, mean, color=colours[objective])


def smooth(series: pd.Series) -> pd.Series:
    """Return the centered running mean over SMOOTHING_STEPS steps, shorter at both ends."""
    return series.sort_index().rolling(SMOOTHING_STEPS, center=True, min_periods=1).mean()
