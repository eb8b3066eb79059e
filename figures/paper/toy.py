"""The paper's toy problem: its metric, variances at equal policies, and the visited positions."""

from typing import Any

import numpy as np
import pandas as pd
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
TASKS = ("left", "right")


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the metric of both tasks, variance at equal policies, its ratio, and six heat maps."""
    figure = Figure(figsize=(width, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1.15, 1])
    top_figure, bottom_figure = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    left_axes, right_axes, equal, ratio = top_figure.subplots(2, 2).flat
    for axes, task in ((left_axes, "left"), (right_axes, "right")):
        draw_published(axes, table, task)
    draw_equal_policies(equal, table)
    draw_ratios(ratio, table)
    draw_visits(bottom_figure, table)
    return figure


def discount_colors(table: pd.DataFrame) -> list[tuple[float, Any]]:
    """Return the discounts of a table, each with a color."""
    values = sorted(table["gamma"].dropna().unique())
    return list(zip(values, style.sequential_colors(len(values)), strict=True))


def draw_published(axes: Any, table: pd.DataFrame, task: str) -> None:
    """Draw medians over seeds with bands, and the three published seeds as thin lines."""
    for gamma, colour in discount_colors(table):
        filters = {"variant": "default", "gamma": gamma, "task": task}
        plot_line(
            axes,
            select_rows(table, "metric", "iteration", **filters),
            "iteration",
            color=colour,
            label=f"γ = {gamma:g}",
        )
        seed_rows = select_rows(table, "seed_metric", "iteration", **filters)
        for _, seed_curve in seed_rows.groupby("worlds"):
            axes.plot(seed_curve["iteration"], seed_curve["value"], color=colour, lw=0.4, alpha=0.5)
    axes.set(yscale="log", xlabel="iteration", ylabel="micro-batch variance")
    axes.set_title(f"Published metric, own policies: {task} task")
    axes.legend(ncols=2, fontsize=6)


def draw_equal_policies(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance of every discount at the policies of γ = 0."""
    rows = select_rows(table, "equal_variance", "gamma", variant="default", task="left", path=0.0)
    marks = sorted(rows["iteration"].unique())
    for mark, colour in zip(marks, style.sequential_colors(len(marks)), strict=True):
        mark_rows = rows[rows["iteration"] == mark]
        plot_line(
            axes, mark_rows, "gamma", color=colour, label=f"iteration {mark:g}", marker="o", ms=2.5
        )
    axes.set(yscale="log", xlabel="discount γ", ylabel="variance of one trajectory")
    axes.set_title("At equal policies (those of γ = 0, left task)")
    axes.set_ylim(top=100 * float(rows["high"].max()))
    axes.legend(ncols=2, fontsize=6)


def draw_ratios(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance over that of γ = 0, by the published metric and at equal policies."""
    for quantity, label, colour, marker in (
        ("published_ratio", "published metric, own policies", style.RED, "s"),
        ("equal_ratio", "unbiased, equal policies", style.BLUE, "o"),
    ):
        rows = select_rows(table, quantity, "gamma", variant="default", task="left")
        plot_line(axes, rows, "gamma", color=colour, label=label, marker=marker, ms=3)
    axes.set(yscale="log", xlabel="discount γ", ylabel="variance relative to γ = 0")
    axes.set_title("Relative variance late in training (left task)")
    axes.legend()


def draw_visits(figure: Any, table: pd.DataFrame) -> None:
    """Draw how often each position is visited at each time step."""
    rows = table[table["quantity"] == "visits"]
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for i, task in enumerate(TASKS):
        for j, gamma in enumerate((0.0, 0.5, 1.0)):
            cells = rows[(rows["task"] == task) & (rows["gamma"] == gamma)]
            grid = np.zeros((64, 21))
            y = ((cells["position"].to_numpy() + 8) / 0.25).astype(int)
            grid[y, cells["step"].to_numpy().astype(int)] = cells["value"]
            axes = panels[i, j]
            image = axes.imshow(
                np.sqrt(grid / max(1.0, grid.max())),
                extent=(-0.5, 20.5, -8, 8),
                origin="lower",
                aspect="auto",
                cmap="magma",
                vmin=0,
                vmax=1,
            )
            axes.grid(False)
            axes.axhline((-3, 3)[i], color="white", lw=0.6, ls="--")
            axes.set_title(f"{task} task, γ = {gamma:g}")
    for axes in panels[1]:
        axes.set_xlabel("time step")
    for axes in panels[:, 0]:
        axes.set_ylabel("position")
    figure.colorbar(image, ax=panels, label="visits (square root)", shrink=0.8)
