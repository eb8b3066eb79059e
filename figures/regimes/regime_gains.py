"""Gain of the main methods in every regime that has enough pairs of models."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from diagnostics.errors import InvalidInput
from figures import style
from figures.collect.regimes import COLUMNS as TABLE_COLUMNS
from figures.collect.regimes import MIN_PAIRS, regimes_of, regimes_table, summarize_regimes
from figures.labels import method_label, regime_label

COLUMNS = TABLE_COLUMNS
CAPTION = (
    "Which method gains depends on what is wrong with a pair of models. Gain of held-out accuracy "
    "in every regime of the map with at least five pairs of models that were trained apart, with "
    "95 % intervals over pairs and problems. Grey: from the student before training to the "
    "teacher, mean over pairs. Above the line, tokens that are foreign to the teacher grow denser; "
    "below it there is one foreign tag a response, and something else differs. All methods have as "
    "many responses a step; SFT reads those of the teacher."
)
METHODS = {
    "sampled": (style.RED, "o"),
    "lsm_mask": (style.BLUE, "^"),
    "full_kl": (style.GREEN, "s"),
    "sft": (style.PURPLE, "D"),
}
"""Color and mark of each method, from top to bottom in a regime."""
DENSITY = "density"
SPREAD = 0.6
"""Share of a row's height over which the marks of its methods are spread."""
TEACHER_LEAD = "#DDDDDD"


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a regime, with a mark for the gain of every method."""
    results = results_of_regimes(table)
    regimes = list(dict.fromkeys(results["regime"]))
    narrow = style.is_column(width)
    figure, (ax,) = style.make_panels(1, 1, 1.2 + 0.42 * len(regimes), width=width)
    positions = {regime: -number for number, regime in enumerate(regimes)}
    for regime, rows in results.groupby("regime", sort=False):
        lead = rows["teacher_accuracy"].mean() - rows["start"].mean()
        ax.barh(positions[str(regime)], lead, height=0.8, color=TEACHER_LEAD, lw=0, zorder=1)
    for number, (method, (color, mark)) in enumerate(METHODS.items()):
        rows = results[results["method"] == method]
        shift = SPREAD * (0.5 - number / (len(METHODS) - 1))
        ax.errorbar(
            rows["value"],
            [positions[regime] + shift for regime in rows["regime"]],
            xerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
            fmt=mark,
            ms=3.5,
            elinewidth=0.9,
            color=color,
            label=method_label(method),
        )
    draw_rows(ax, positions, sum(name in regimes_of(table, DENSITY) for name in regimes))
    handles = [*ax.get_legend_handles_labels()[0], Patch(color=TEACHER_LEAD, label="teacher")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if narrow else 5)
    return figure


def draw_rows(ax: Any, positions: dict[str, int], num_density: int) -> None:
    """Name the rows, and separate the regimes of the density from the others.

    Args:
        ax: Axes.
        positions: Regime to its height.
        num_density: Number of regimes of the density, which come first.
    """
    ax.axvline(0.0, lw=0.8, color="#444444", zorder=2)
    if 0 < num_density < len(positions):
        ax.axhline(0.5 - num_density, lw=0.8, color="#444444")
    ax.set_yticks(list(positions.values()), [regime_label(name) for name in positions])
    ax.set_ylim(0.5 - len(positions), 0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("gain of held-out accuracy")


def results_of_regimes(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the gains that are drawn.

    Args:
        table: A table with COLUMNS.

    Returns:
        Rows of `summarize_regimes` with at least MIN_PAIRS pairs, those of the density first.

    Raises:
        InvalidInput: No regime has enough pairs with runs of the methods.
    """
    density = regimes_of(table, DENSITY)
    others = sorted(set(table["group"]) - set(density), key=_by_number)
    results = summarize_regimes(table, [*density, *others], list(METHODS))
    enough = results[results["pairs"] >= MIN_PAIRS]
    if enough.empty:
        raise InvalidInput(
            f"no regime of the table has at least {MIN_PAIRS} pairs of models with runs of "
            f"{', '.join(METHODS)}; `opd map --regimes REGIME --pairs {MIN_PAIRS}` makes them"
        )
    return enough


def _by_number(regime: str) -> tuple[str, float]:
    """Return the sort key of a regime: its family, and its number where it has one."""
    family, _, end = regime.rpartition("-")
    return (family, float(end)) if end.replace(".", "", 1).isdigit() else (regime, 0.0)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the map from its run folders."""
    return regimes_table(runs)
