"""Gain of every method against the density of foreign tokens, and the table of all regimes."""

from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.regimes import COLUMNS as TABLE_COLUMNS
from figures.collect.regimes import regimes_of, regimes_table, summarize_regimes
from figures.labels import method_label

COLUMNS = TABLE_COLUMNS
CAPTION = (
    "What methods gain, by how many tokens of the student's responses the teacher hardly knows. "
    "Across: share of foreign tokens in the student's responses before training, measured. Up: "
    "accuracy on held-out problems after training minus before. Lines: means over pairs of models "
    "that were trained apart, and their problems; bars: 95 % intervals over both. The teacher's "
    "log-probability of these tokens is the same in all regimes. All methods have as many "
    "responses a step; local supports and variants take them from the nucleus 0.9, as in the "
    "paper. SFT and offline KL read responses of the teacher."
)
FAMILY = "density"
STYLES = {
    "sampled": (style.RED, "-", "o"),
    "sampled_mask": (style.ORANGE, "--", "s"),
    "lsm": (style.BLUE, "-", "^"),
    "lsm_mask": (style.SKY, "--", "v"),
    "sampled_top_p": (style.GREEN, "-.", "s"),
    "sampled_reward": (style.PURPLE, "--", "D"),
    "sampled_gamma_0.5": (style.GREY, "-", "P"),
    "sampled_gamma_0.5_baseline": (style.GREY, ":", "X"),
    "sampled_gamma_1": ("black", "-", "P"),
    "sampled_gamma_1_baseline": ("black", ":", "X"),
    "full_kl": (style.GREEN, "-", "o"),
    "sft": (style.PURPLE, "-", "s"),
    "offline_kl": (style.YELLOW, "-.", "^"),
    "lsm_whole": (style.BLUE, ":", "D"),
}
"""Method to color, dash and mark."""
PAPER_METHODS = ("sampled", "sampled_mask", "lsm", "lsm_mask")
PANELS = {
    "The paper's methods": PAPER_METHODS,
    "Additions": (
        *("sampled_top_p", "lsm_whole", "sampled_reward", "sampled_gamma_0.5"),
        *("sampled_gamma_0.5_baseline", "sampled_gamma_1", "sampled_gamma_1_baseline"),
    ),
    "References": ("full_kl", "sft", "offline_kl"),
}
"""Title of a panel to its methods."""
SHIFTS = {"Additions": 0.12}
"""Title of a panel to the share by which the bars of each method are moved beyond the last ones."""
LINEAR_UP_TO = 1e-3
"""Share of foreign tokens below which the axis is linear, so that it has a 0."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the gain of every method against the measured share of foreign tokens."""
    narrow = style.is_column(width)
    present = set(table[table["family"] == FAMILY]["method"])
    panels = {
        title: [name for name in methods if name in present]
        for title, methods in PANELS.items()
        if present.intersection(methods)
    }
    rows, columns = (len(panels), 1) if narrow else (1, len(panels))
    height = 1.6 + 1.9 * len(panels) if narrow else 3.5
    figure, axes = style.make_panels(rows, columns, height, width=width)
    regimes = regimes_of(table, FAMILY)
    for ax, (title, methods) in zip(axes, panels.items(), strict=True):
        results = summarize_regimes(table, regimes, methods)
        shift = SHIFTS.get(title, 0.0)
        for number, (method, rows_of_method) in enumerate(results.groupby("method", sort=False)):
            color, dash, mark = STYLES[str(method)]
            draw_dose(ax, rows_of_method, shift * number, color=color, ls=dash, marker=mark)
        set_density_axis(ax)
        ax.set(title=title)
    limits = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    for ax in axes if narrow else axes[:1]:
        ax.set_ylabel("gain of held-out accuracy")
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else 3)
    return figure


def draw_dose(ax: Any, results: pd.DataFrame, shift: float = 0.0, **options: Any) -> None:
    """Draw a method's values with intervals against the share of foreign tokens.

    Args:
        ax: Axes.
        results: Rows of `summarize_regimes` of one method.
        shift: Share of it by which bars are moved to the right, so that those of several methods do
            not hide each other.
        **options: Options of the line.
    """
    results = results.sort_values("foreign_share")
    value = results["value"]
    ax.errorbar(
        results["foreign_share"] * (1 + shift),
        value,
        yerr=[value - results["low"], results["high"] - value],
        ms=3,
        elinewidth=0.8,
        capsize=1.5,
        label=method_label(str(results["method"].iloc[0])),
        **options,
    )


def set_density_axis(ax: Any) -> None:
    """Make the horizontal axis a share of foreign tokens, logarithmic with a 0."""
    ax.axhline(0.0, lw=0.8, color="#444444", zorder=1)
    ax.set_xscale("symlog", linthresh=LINEAR_UP_TO)
    ax.set_xticks([0, 0.001, 0.01, 0.1], ["0", "0.1 %", "1 %", "10 %"])
    ax.set_xlim(-LINEAR_UP_TO / 5, None)
    ax.set_xlabel("foreign tokens")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the gain of every method in every regime (`summarize_regimes`)."""
    regimes = list(dict.fromkeys(table["group"]))
    return summarize_regimes(table, regimes, list(dict.fromkeys(table["method"])))


def markdown(results: pd.DataFrame) -> str:
    """Render the gains of `summary` as a Markdown table, one row a regime."""
    methods = [str(name) for name in dict.fromkeys(results["method"])]
    lines = [
        "Gain of accuracy on held-out problems, last minus first. Brackets: 95 % intervals over "
        "pairs of models and problems. In parentheses: runs whose accuracy falls below half of "
        "its best, of all runs.",
        "",
        "| regime | foreign tokens | their gap in nats | start | teacher | "
        + " | ".join(method_label(name) for name in methods)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(methods),
    ]
    for regime, rows in results.groupby("regime", sort=False):
        pairs = rows.loc[rows["pairs"].idxmax()]
        cells = [
            str(regime),
            f"{pairs['foreign_share']:.2%}",
            "" if isnan(pairs["foreign_gap"]) else f"{pairs['foreign_gap']:.1f}",
            f"{pairs['start']:.3f}",
            f"{pairs['teacher_accuracy']:.3f}",
        ]
        for method in methods:
            selected = rows[rows["method"] == method]
            if selected.empty:
                cells.append("")
                continue
            row = selected.iloc[0]
            cells.append(
                f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] "
                f"({row['collapsed']} of {row['pairs']})"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the map from its run folders."""
    return regimes_table(runs)
