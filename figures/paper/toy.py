"""The paper's toy problem: its metric, variances at equal policies, and the visited positions."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

COLUMNS = (
    "quantity",
    "variant",
    "gamma",
    "task",
    "iteration",
    "path",
    "step",
    "position",
    "worlds",
    "value",
    "low",
    "high",
)
CAPTION = (
    "The paper's toy problem: a student with a Gaussian policy on a line distills two teachers in "
    "turn; the left task starts at +2 and ends at -3, the right task at -2 and +3. A response has "
    "20 steps, and γ is the discount of later costs (0: token level, 1: sequence level). "
    "Published metric: variance of the output layer's gradient over the micro-batches of a step, "
    "each γ at the policies that it has reached; medians over seeds with 95 % intervals, thin: "
    "the three seeds of the paper. Variance at equal policies: of one trajectory, all γ at the "
    "policies of γ = 0, one curve an iteration (drawn across a page). Relative variance late in "
    "training: both, divided by their value at γ = 0; at equal policies most of the published "
    "difference vanishes. Maps: share of 2,048 trajectories in each cell of position and time "
    "step after training, white if none, on one logarithmic scale. In the paper γ = 1 misses the "
    "targets; here all γ reach them: the number in a map is the mean distance between the last "
    "position and the target (median over seeds)."
)
TASKS = {"left": -3, "right": 3}
"""Target position of each task."""
START, CELL, LIMIT = 2, 0.25, 8
"""Distance of both starts from 0, height of a cell of the maps, and largest position."""
SHOWN = 4.6
"""Largest position that the maps show."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the metric, variance at equal policies, their ratio to γ = 0, and maps of positions.

    One column leaves out the right task's metric, variance at equal policies of single iterations,
    and the maps of γ = 0.5: the ratio has the finding, and both tasks behave alike.
    """
    if style.is_column(width):
        figure = Figure(figsize=(width, 7.0), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=[1.2, 1])
        top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        metric, ratio = top.subplots(2, 1)
        draw_published(metric, table, "left")
        metric.legend(ncols=2, loc="upper right")
        draw_visits(bottom, table, (0.0, 1.0), "bottom")
    else:
        figure = Figure(figsize=(width, 7.6), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=[1.3, 1])
        top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        *published, equal, ratio = top.subplots(2, 2).flat
        for axes, task in zip(published, TASKS, strict=True):
            draw_published(axes, table, task)
        published[1].sharey(published[0])
        published[0].legend(ncols=2, loc="upper right")
        draw_equal_policies(equal, table)
        draw_visits(bottom, table, (0.0, 0.5, 1.0), "right")
    draw_ratios(ratio, table)
    return figure


def discount_colors(table: pd.DataFrame) -> list[tuple[float, Any]]:
    """Return the discounts of a table, each with a color."""
    values = sorted(table["gamma"].dropna().unique())
    return list(zip(values, style.sequential_colors(len(values)), strict=True))


def draw_published(axes: Any, table: pd.DataFrame, task: str) -> None:
    """Draw medians over seeds with bands, and the three published seeds as thin lines."""
    for gamma, colour in discount_colors(table):
        filters = {"variant": "default", "gamma": gamma, "task": task}
        rows = select_rows(table, "metric", "iteration", **filters)
        plot_line(axes, rows, "iteration", color=colour, label=f"γ = {gamma:g}")
        seed_rows = select_rows(table, "seed_metric", "iteration", **filters)
        for _, seed_curve in seed_rows.groupby("worlds"):
            axes.plot(seed_curve["iteration"], seed_curve["value"], color=colour, lw=0.4, alpha=0.5)
    axes.plot([], [], color="#777777", lw=0.6, label="the paper's seeds")
    axes.set(yscale="log", xlabel="iteration", ylabel="variance of micro-batches")
    axes.set_title(f"Published metric, {task} task")


def draw_equal_policies(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance of every discount at the policies of γ = 0, each curve labelled."""
    rows = select_rows(table, "equal_variance", "gamma", variant="default", task="left", path=0.0)
    for iteration, curve in rows.groupby("iteration"):
        plot_line(axes, curve, "gamma", color=style.BLUE, marker="o", ms=2.5)
        last = curve.iloc[-1]
        is_first = iteration == rows["iteration"].min()
        text = ("iteration " if is_first else "") + f"{iteration:g}"
        axes.annotate(
            text,
            (last["gamma"], last["value"]),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.MIN_FONT_SIZE,
            color=style.BLUE,
        )
    axes.set(yscale="log", xlabel="discount γ", ylabel="variance of one trajectory")
    axes.set(xlim=(-0.05, 1.36), xticks=(0, 0.25, 0.5, 0.75, 1))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("Variance at equal policies, left task")


def draw_ratios(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance over that of γ = 0, by the published metric and at equal policies."""
    findings = []
    for quantity, label, name, colour, marker in (
        ("published_ratio", "published metric, own policies", "published", style.RED, "s"),
        ("equal_ratio", "variance at equal policies", "equal policies", style.BLUE, "o"),
    ):
        rows = select_rows(table, quantity, "gamma", variant="default", task="left")
        plot_line(axes, rows, "gamma", color=colour, label=label, marker=marker, ms=3)
        findings += [f"{name} {x:.2g}×" for x in rows["value"].tail(1)]
    axes.set(xlabel="discount γ", ylabel="variance / that of γ = 0")
    style.set_log_axis(axes)
    axes.set(xticks=(0, 0.25, 0.5, 0.75, 1))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"γ = 1: {', '.join(findings)}")
    axes.legend()


def draw_visits(
    figure: Any, table: pd.DataFrame, discounts: tuple[float, ...], bar_side: str
) -> None:
    """Draw the share of trajectories at each position and time step, on one logarithmic scale."""
    panels = figure.subplots(len(TASKS), len(discounts), sharex=True, sharey=True)
    scale = LogNorm(1 / 2048, 1)
    for panel_row, (task, target) in zip(panels, TASKS.items(), strict=True):
        for axes, gamma in zip(panel_row, discounts, strict=True):
            extent = (-0.5, 20.5, -LIMIT, LIMIT)
            options: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": extent}
            shares = visit_shares(table, task, gamma)
            image = axes.imshow(shares, cmap="viridis_r", norm=scale, **options)
            axes.grid(visible=False)
            axes.axhline(target, color=style.RED, lw=0.8, ls="--")
            axes.set(ylim=(-SHOWN, SHOWN), yticks=(-3, 0, 3), xticks=(0, 10, 20))
            axes.set_title(f"{task.capitalize()} task, γ = {gamma:g}")
            label_map(axes, table, task, gamma)
    for axes in panels[-1]:
        axes.set_xlabel("time step")
    for axes in panels[:, 0]:
        axes.set_ylabel("position")
    options = {"location": bar_side, "shrink": 0.9, "aspect": 30, "pad": 0.02}
    figure.colorbar(image, ax=panels, label="share of trajectories", **options)


def visit_shares(table: pd.DataFrame, task: str, gamma: float) -> Any:
    """Return the share of trajectories in each cell (position, time step); NaN where none is."""
    rows = table[table["quantity"] == "visits"]
    cells = rows[(rows["task"] == task) & (rows["gamma"] == gamma)]
    counts = np.full((round(2 * LIMIT / CELL), 21), np.nan)
    y = ((cells["position"].to_numpy() + LIMIT) / CELL).astype(int)
    counts[y, cells["step"].to_numpy().astype(int)] = cells["value"]
    return counts / cells.groupby("step")["value"].sum().max()


def label_map(axes: Any, table: pd.DataFrame, task: str, gamma: float) -> None:
    """Write the start, the target, and the mean distance to it at the end into a map."""
    target = TASKS[task]
    side = 1 if target > 0 else -1
    options: dict[str, Any] = {"fontsize": style.MIN_FONT_SIZE, "va": "center"}
    axes.text(1.2, -side * START, "start", **options)
    axes.text(20, target - side * 1.3, "target", ha="right", color=style.RED, **options)
    filters = {"variant": "default", "task": task, "gamma": gamma}
    for value in select_rows(table, "distance", "gamma", **filters)["value"]:
        axes.text(20, 0, f"distance {value:.2f}", ha="right", **options)
