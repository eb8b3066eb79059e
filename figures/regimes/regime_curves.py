"""Learning curves in the regime that is nearest to the paper's."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style
from figures.collect.matched import learning_curves
from figures.collect.regimes import COLUMNS as TABLE_COLUMNS
from figures.collect.regimes import regimes_of, regimes_table
from figures.labels import method_label
from figures.regimes.dose import FAMILY, PAPER_METHODS, STYLES

COLUMNS = TABLE_COLUMNS
CAPTION = (
    "Learning curves where foreign tokens are few, as in the paper, and where they are many. The "
    "titles give their measured share in the student's responses before training. Lines: mean "
    "held-out accuracy over pairs of models that were trained apart, and problems; bands: 95 % "
    "intervals over both. Dotted: the teachers' mean accuracy."
)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the curves of the paper's methods in the sparsest and the densest mismatch."""
    narrow = style.is_column(width)
    regimes = [name for name in regimes_of(table, FAMILY) if has_tags(table, name)]
    if not regimes:
        raise InvalidInput("the table has no regime of the family density with foreign tokens")
    shown = list(dict.fromkeys((regimes[0], regimes[-1])))
    rows, columns = (len(shown), 1) if narrow else (1, len(shown))
    figure, axes = style.make_panels(rows, columns, 5.4 if narrow else 3.1, width=width)
    for ax, regime in zip(axes, shown, strict=True):
        evaluations = table[table["group"] == regime]
        for method, curve in learning_curves(evaluations, PAPER_METHODS).items():
            color, dash, mark = STYLES[method]
            style.plot_band(
                ax,
                curve["step"],
                curve["accuracy"],
                curve["low"],
                curve["high"],
                label=method_label(method),
                color=color,
                ls=dash,
                marker=mark,
                ms=3,
            )
        ax.axhline(evaluations["teacher_accuracy"].mean(), ls=":", lw=1, color="#444444")
        share = evaluations["foreign_share"].mean()
        ax.set(title=f"{share:.2%} foreign tokens", xlabel="step", ylim=(0, 1.02))
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in axes if narrow else axes[:1]:
        ax.set_ylabel("held-out accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if narrow else 4)
    return figure


def has_tags(table: pd.DataFrame, regime: str) -> bool:
    """Return whether the pairs of a regime have foreign tags."""
    return bool((table[table["group"] == regime]["foreign_tags"] > 0).all())


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the map from its run folders."""
    return regimes_table(runs)
