"""Where the variants V2 to V5 of the support turn: their gain beyond V1, against density."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.regimes import COLUMNS as TABLE_COLUMNS
from figures.collect.regimes import regimes_of, regimes_table, summarize_regimes
from figures.regimes.dose import FAMILY, draw_dose, set_density_axis

COLUMNS = TABLE_COLUMNS
CAPTION = (
    "Variants of local support: the gain of V2 to V5 minus that of V1, paired by pair of models "
    "and by problem. V2 and V3 add the sampled token to the student's or the teacher's K; V4 and "
    "V5 correct for the tail outside the student's or the teacher's K as published. Across: share "
    "of foreign tokens in the student's responses before training, measured. Bars: 95 % intervals "
    "over pairs and problems."
)
BASELINE = "lsm"
VARIANTS = {
    "v2_student_and_sampled": (style.ORANGE, "-", "o"),
    "v3_teacher_and_sampled": (style.RED, "--", "s"),
    "v4_student_tail": (style.GREEN, "-.", "^"),
    "v5_teacher_tail": (style.PURPLE, ":", "v"),
}
"""Variant to color, dash and mark."""
SHIFT = 0.08
"""Share by which the bars of each variant are moved beyond those of the one before."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the gain of every variant beyond V1."""
    figure, (ax,) = style.make_panels(1, 1, 3.0, width=width)
    results = summarize_regimes(table, regimes_of(table, FAMILY), list(VARIANTS), BASELINE)
    for number, (variant, rows) in enumerate(results.groupby("method", sort=False)):
        color, dash, mark = VARIANTS[str(variant)]
        draw_dose(ax, rows, SHIFT * number, color=color, ls=dash, marker=mark)
    set_density_axis(ax)
    ax.set_ylabel("gain minus that of V1")
    ax.legend()
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the map from its run folders."""
    return regimes_table(runs)
