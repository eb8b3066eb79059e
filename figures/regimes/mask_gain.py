"""What a mask of foreign tokens is worth, against their density."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.regimes import COLUMNS as TABLE_COLUMNS
from figures.collect.regimes import regimes_of, regimes_table, summarize_regimes
from figures.regimes.dose import FAMILY, draw_dose, set_density_axis

COLUMNS = TABLE_COLUMNS
CAPTION = (
    "What a mask is worth: the gain of a method with a mask of the foreign tokens minus that "
    "without, paired by pair of models and by problem. Across: share of foreign tokens in the "
    "student's responses before training, measured. Bars: 95 % intervals over pairs and problems."
)
COMPARISONS = {
    "sampled": (style.RED, "-", "o"),
    "lsm": (style.BLUE, "--", "^"),
}
"""Method to color, dash and mark; the masked one is METHOD_mask."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the worth of a mask for each of COMPARISONS."""
    figure, (ax,) = style.make_panels(1, 1, 3.0, width=width)
    regimes = regimes_of(table, FAMILY)
    for method, (color, dash, mark) in COMPARISONS.items():
        results = summarize_regimes(table, regimes, [f"{method}_mask"], baseline=method)
        draw_dose(ax, results.assign(method=method), color=color, ls=dash, marker=mark)
    set_density_axis(ax)
    ax.set_ylabel("masked minus unmasked")
    ax.legend()
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the map from its run folders."""
    return regimes_table(runs)
