"""Training dynamics: accuracy, divergence and supervision during training runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.records.run_tables import training_table
from diagnostics.stats import problem_accuracies, share_interval
from figures import style
from figures.labels import method_label

COLUMNS = ("run", "objective", "seed", "step", "metric", "value", "outcomes")
CAPTION = (
    "Training runs by objective: sampled token, and local support (renormalised reverse KL on the "
    "teacher's top K). Held-out accuracy: mean over seeds and problems with 95 % intervals over "
    "both. The rest: single runs (thin) and the mean over the runs of an objective (thick, "
    "running mean over 5 steps). Reverse KL: log p - log q of the student's own tokens, nats per "
    "token; gradient norm before clipping; share with q < p: of the sampled tokens (a negative "
    "signal), and (broad and pale) the share expected from the two models' distributions; top 1 % "
    "of the tokens: share of the sum of |log q - log p| that they have; truncated: share of the "
    "responses that reach the budget."
)
SMOOTHING_STEPS = 5
"""Window of the running mean in steps; the raw values are drawn faintly."""
PANELS = (
    ("divergence/reverse_kl", "Reverse KL, nats", "log"),
    ("grad_norm", "Gradient norm", "log"),
    ("signal/negative_share", "Share with q < p", "linear"),
    ("signal/signal_top1_share", "Signal in the top 1 %", "linear"),
    ("response/truncated_share", "Truncated, share", "linear"),
)
"""Metric, title and scale of the panels after the accuracy."""
COLOURS = {"sampled_token": style.RED, "teacher_topk": style.BLUE}
OTHER_COLOURS = tuple(x for x in style.CYCLE if x not in COLOURS.values())
"""Colors of these objectives, as in the other figures, and of any other."""
EXPECTED: dict[str, Any] = {"lw": 5, "alpha": 0.3}
"""Line of the expected share of negative signal, visible under the measured one."""


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of rows and evaluations of runs, see `training_table`."""
    return training_table(runs)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw six panels; thin lines are runs, thick ones means over the seeds of an objective."""
    objectives = sorted(table["objective"].unique())
    others = [x for x in objectives if x not in COLOURS]
    colours = COLOURS | dict(zip(others, OTHER_COLOURS * len(objectives), strict=False))
    narrow = style.is_column(width)
    legend_height = 0.08 * len(objectives)
    if narrow:
        figure, axes = style.make_panels(3, 2, 5.1 + legend_height, width=width)
    else:
        figure, axes = style.make_panels(2, 3, 4.1 + legend_height, width=width)
    draw_accuracy(axes[0], table, colours)
    for ax, (metric, title, scale) in zip(axes[1:], PANELS, strict=True):
        if metric == "signal/negative_share":
            draw_expected(ax, table, colours)
        draw_metric(ax, table, metric, colours)
        ax.set_title(title)
        if scale == "log":
            style.set_log_axis(ax)
    for ax in axes[-2 if narrow else -3 :]:
        ax.set_xlabel("step")
    add_legend(figure, axes[0])
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
        label = f"{method_label(objective)} ({count} seed{'s' if count > 1 else ''})"
        x, y, low, high = zip(*points, strict=True)
        options = {"color": colours[objective], "marker": "o", "ms": 3, "label": label}
        style.plot_band(axes, x, y, low, high, **options)
    axes.set_title("Held-out accuracy")
    axes.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    axes.yaxis.set_major_formatter("{x:g}")


def draw_expected(axes: Any, table: pd.DataFrame, colours: dict[str, str]) -> None:
    """Draw the share of negative signal that is expected from the two models."""
    rows = table[table["metric"] == "signal/negative_share_null"].dropna(subset=["value"])
    for objective, objective_rows in rows.groupby("objective"):
        mean = smooth(objective_rows.groupby("step")["value"].mean())
        axes.plot(mean.index, mean, color=colours[objective], **EXPECTED)


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


def add_legend(figure: Figure, axes: Any) -> None:
    """Explain objectives and kinds of lines below the panels."""
    handles, labels = axes.get_legend_handles_labels()
    for label, options in (
        ("single run", {"lw": 0.6, "alpha": 0.6}),
        ("expected from the models", EXPECTED),
    ):
        handles.append(Line2D([], [], color="#555555", **options))
        labels.append(label)
    longest = 0.4 + 0.056 * max(map(len, labels))  # inches: the line, and the text at 7 pt
    num_columns = max(1, int(figure.get_size_inches()[0] / longest))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, num_columns))


def smooth(series: pd.Series) -> pd.Series:
    """Return the centered running mean over SMOOTHING_STEPS steps, shorter at both ends."""
    return series.sort_index().rolling(SMOOTHING_STEPS, center=True, min_periods=1).mean()
