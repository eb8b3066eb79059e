"""The published toy: its metric, variances at equal policies, and where the students go."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

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


def draw(table: pd.DataFrame) -> Figure:
    """Metric of both tasks, equal-policy variance and its ratio; six heat maps below."""
    figure = Figure(figsize=(style.WIDTH, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1.15, 1])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    left, right, equal, ratio = above.subplots(2, 2).flat
    for axes, task in ((left, "left"), (right, "right")):
        published(axes, table, task)
    at_equal(equal, table)
    ratios(ratio, table)
    maps(below, table)
    return figure


def gammas(table: pd.DataFrame) -> list[tuple[float, Any]]:
    values = sorted(table["gamma"].dropna().unique())
    return list(zip(values, style.shades(len(values)), strict=True))


def published(axes: Any, table: pd.DataFrame, task: str) -> None:
    """Medians over seeds with bands; the three published seeds as thin lines."""
    for gamma, colour in gammas(table):
        where = {"variant": "default", "gamma": gamma, "task": task}
        line(
            axes,
            pick(table, "metric", "iteration", **where),
            "iteration",
            color=colour,
            label=f"γ = {gamma:g}",
        )
        alone = pick(table, "seed_metric", "iteration", **where)
        for _, mine in alone.groupby("worlds"):
            axes.plot(mine["iteration"], mine["value"], color=colour, lw=0.4, alpha=0.5)
    axes.set(yscale="log", xlabel="iteration", ylabel="micro-batch variance")
    axes.set_title(f"As published, own paths: {task} task")
    axes.legend(ncols=2, fontsize=6)


def at_equal(axes: Any, table: pd.DataFrame) -> None:
    rows = pick(table, "equal_variance", "gamma", variant="default", task="left", path=0.0)
    marks = sorted(rows["iteration"].unique())
    for mark, colour in zip(marks, style.shades(len(marks)), strict=True):
        at = rows[rows["iteration"] == mark]
        line(axes, at, "gamma", color=colour, label=f"iteration {mark:g}", marker="o", ms=2.5)
    axes.set(yscale="log", xlabel="discount γ", ylabel="variance of one trajectory")
    axes.set_title("At equal policies (γ = 0's path, left task)")
    axes.set_ylim(top=100 * float(rows["high"].max()))
    axes.legend(ncols=2, fontsize=6)


def ratios(axes: Any, table: pd.DataFrame) -> None:
    for quantity, label, colour, marker in (
        ("published_ratio", "published metric, own paths", style.RED, "s"),
        ("equal_ratio", "unbiased, equal policies", style.BLUE, "o"),
    ):
        rows = pick(table, quantity, "gamma", variant="default", task="left")
        line(axes, rows, "gamma", color=colour, label=label, marker=marker, ms=3)
    axes.set(yscale="log", xlabel="discount γ", ylabel="variance over that of γ = 0")
    axes.set_title("How much noisier, late in training (left task)")
    axes.legend()


def maps(figure: Any, table: pd.DataFrame) -> None:
    rows = table[table["quantity"] == "visits"]
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for i, task in enumerate(TASKS):
        for j, gamma in enumerate((0.0, 0.5, 1.0)):
            at = rows[(rows["task"] == task) & (rows["gamma"] == gamma)]
            grid = np.zeros((64, 21))
            y = ((at["position"].to_numpy() + 8) / 0.25).astype(int)
            grid[y, at["step"].to_numpy().astype(int)] = at["value"]
            axes = panels[i, j]
            shown = axes.imshow(
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
    figure.colorbar(shown, ax=panels, label="visits, square root", shrink=0.8)
