"""Renormalisation, K and top-p of the local support (the paper's figure 6), entropy and score."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from figures import style
from figures.dynamics import COLUMNS as COLUMNS
from figures.steps import over_seeds, steps

CAPTION = (
    "The local support objective without a mask: with and without renormalisation, by K (8 where "
    "not said, of 261 ids), and by the nucleus of the rollouts (0.9 where not said). Above, the "
    "student's entropy on its own rollouts; below, their score. Mean over seeds with a 95 % "
    "interval (Student's t). The score of a run is on rollouts from its own nucleus: a smaller "
    "one scores higher with the same student; held-out accuracies at top-p 1 are in the "
    "comparison. The paper has K of 16, 32 and 48 of 152k ids."
)
PANELS = {
    "Renormalisation": {"lsm": "renormalised", "lsm_unnormalised": "not"},
    "K": {"lsm_k2": "K = 2", "lsm_k4": "K = 4", "lsm": "K = 8"},
    "Nucleus": {"lsm_whole": "top-p 1", "lsm": "top-p 0.9", "lsm_top_p_0.8": "top-p 0.8"},
}


def draw(table: pd.DataFrame) -> Figure:
    """A column an ablation."""
    table = table[table["group"] == "single"]
    figure, axes = style.panels(2, len(PANELS), 3.6)
    for i, (title, methods) in enumerate(PANELS.items()):
        colours = (style.BLUE, style.RED) if len(methods) == 2 else style.shades(len(methods))
        for column, place in (("entropy", axes[i]), ("reward", axes[len(PANELS) + i])):
            for (method, label), colour in zip(methods.items(), colours, strict=True):
                mean = over_seeds(table[table["method"] == method], column, column == "entropy")
                if len(mean):
                    band = (mean["step"], mean["value"], mean["low"], mean["high"])
                    style.curve(place, *band, color=colour, label=label)
        axes[i].set(yscale="log", title=title)
        axes[i].yaxis.set_minor_formatter(NullFormatter())
        axes[i].legend(loc="best")
        axes[len(PANELS) + i].set(xlabel="step", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("entropy, nats")
    axes[len(PANELS)].set_ylabel("train score")
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    return steps(runs)
