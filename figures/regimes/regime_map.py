"""Gain of a method by density and strength of the mismatch, with the paper's place."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from figures import style
from figures.collect.regimes import COLUMNS as TABLE_COLUMNS
from figures.collect.regimes import MIN_PAIRS, regimes_of, regimes_table, summarize_regimes
from figures.labels import method_label

COLUMNS = TABLE_COLUMNS
CAPTION = (
    "Gain of held-out accuracy by the mismatch of a pair of models: how many of the student's "
    "tokens are foreign to the teacher (across), and how much less probable they are to it than to "
    "the student (up). Both are measured before training; a disk is a regime, a mean over five or "
    "more pairs of models trained apart, with the gain in it; a dashed one is a mean over fewer, "
    "which need not differ where disks do. The star is the place of the paper: about three "
    "foreign tokens, a tag's first, its second and the end token, in responses of 2,000 to 16,000 "
    "tokens, 19 nats for a tag and 59 for the end token (figures 5 and A6c there)."
)
FAMILIES = ("density", "strength", "plane")
METHODS = ("sampled", "sampled_mask", "lsm")
PAPER_SHARES = (3 / 16000, 3 / 2000)
PAPER_GAPS = (19.2, 58.7)
TOP = 62.0
"""Upper end of the axis in nats."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a method with a disk for every regime that has foreign tokens."""
    narrow = style.is_column(width)
    present = [method for method in METHODS if method in set(table["method"])]
    rows, columns = (len(present), 1) if narrow else (1, len(present))
    figure, axes = style.make_panels(rows, columns, 7.2 if narrow else 3.1, width=width)
    results = summarize_regimes(table, regimes_of(table, *FAMILIES), present)
    results = results[results["foreign_share"] > 0]
    limit = max(0.05, float(results["value"].abs().max()))
    colors = mpl.colormaps["RdBu"]
    norm = TwoSlopeNorm(vcenter=0.0, vmin=-limit, vmax=limit)
    for ax, method in zip(axes, present, strict=True):
        draw_regimes(ax, results[results["method"] == method], colors, norm)
        ax.set(title=method_label(method), xlabel="foreign tokens")
    for ax in axes if narrow else axes[:1]:
        ax.set_ylabel("gap of a foreign token, nats")
    figure.colorbar(
        mpl.cm.ScalarMappable(norm, colors), ax=axes, label="gain of accuracy", shrink=0.8
    )
    return figure


def draw_regimes(ax: Any, results: pd.DataFrame, colors: Any, norm: Any) -> None:
    """Draw the disks of one method and the paper's place.

    Args:
        ax: Axes.
        results: Rows of `summarize_regimes` of one method.
        colors: Color map of gains.
        norm: Normalisation of gains.
    """
    has_enough = results["pairs"] >= MIN_PAIRS
    for rows, line, line_width in (
        (results[has_enough], "-", 0.6),
        (results[~has_enough], "--", 1.2),
    ):
        ax.scatter(
            rows["foreign_share"],
            rows["foreign_gap"],
            c=rows["value"],
            cmap=colors,
            norm=norm,
            s=330,
            edgecolors="#444444" if line == "-" else "#000000",
            linewidths=line_width,
            linestyles=line,
            alpha=1.0 if line == "-" else 0.45,
        )
    for row in results.itertuples():
        is_dark = abs(row.value) > 0.6 * norm.vmax and row.pairs >= MIN_PAIRS
        ax.text(
            row.foreign_share,
            row.foreign_gap,
            f"{row.value:+.2f}".replace("0.", "."),
            ha="center",
            va="center",
            fontsize=style.MIN_FONT_SIZE,
            color="white" if is_dark else "black",
        )
    share = (PAPER_SHARES[0] * PAPER_SHARES[1]) ** 0.5
    ax.plot([share, share], PAPER_GAPS, color="black", lw=0.8)
    ax.plot(PAPER_SHARES, [PAPER_GAPS[0]] * 2, color="black", lw=0.8)
    ax.plot([share], [PAPER_GAPS[0]], marker="*", ms=10, color="black", ls="")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlim=(1e-4, 0.4), ylim=(1.0, TOP))
    ax.set_xticks([1e-3, 1e-2, 1e-1], ["0.1 %", "1 %", "10 %"])
    ax.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    ax.minorticks_off()


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the map from its run folders."""
    return regimes_table(runs)
