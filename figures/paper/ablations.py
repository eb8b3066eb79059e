"""Renormalisation, K and top-p of the local support (the paper's figure 6), entropy and score."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import chosen, over_seeds, steps
from figures.paper.dynamics import COLUMNS as COLUMNS

CAPTION = (
    "The local support objective without a mask: with and without renormalisation, by K (8 where "
    "not said, of 261 ids), and by the nucleus of the rollouts (0.9 where not said). Above, the "
    "student's entropy on its own rollouts; in the middle their score; below, accuracy on held-out "
    "problems at top-p 1. Mean over seeds with a 95 % interval (Student's t). The score of a run "
    "is on rollouts from its own nucleus: a smaller one scores higher with the same student. The "
    "paper has K of 16, 32 and 48 of 152k ids, shows either score in a panel, and 400 steps."
)
ROWS = {
    "entropy": "entropy, nats",
    "reward": "train score",
    "accuracy": "held-out accuracy",
}
PANELS = {
    "Renormalisation": {"lsm": "renormalised", "lsm_unnormalised": "not"},
    "K": {"lsm_k2": "K = 2", "lsm_k4": "K = 4", "lsm": "K = 8"},
    "Nucleus": {"lsm_whole": "top-p 1", "lsm": "top-p 0.9", "lsm_top_p_0.8": "top-p 0.8"},
}


def draw(table: pd.DataFrame) -> Figure:
    """A column an ablation, a row a quantity."""
    table = chosen(table, "single", {method for some in PANELS.values() for method in some})
    figure, axes = style.panels(len(ROWS), len(PANELS), 4.9)
    for i, (title, methods) in enumerate(PANELS.items()):
        colours = (style.BLUE, style.RED) if len(methods) == 2 else style.shades(len(methods))
        for place, column in zip(axes[i :: len(PANELS)], ROWS, strict=True):
            for (method, label), colour in zip(methods.items(), colours, strict=True):
                mean = over_seeds(table[table["method"] == method], column, column == "entropy")
                if len(mean):
                    band = (mean["step"], mean["value"], mean["low"], mean["high"])
                    how: dict[str, Any] = {"marker": "o", "ms": 3} if column == "accuracy" else {}
                    style.curve(place, *band, color=colour, label=label, **how)
            if column != "entropy":
                place.set_ylim(-0.02, 1.02)
        axes[i].set_title(title)
        style.log_axis(axes[i])
        axes[i].legend(loc="best")
        axes[-len(PANELS) + i].set_xlabel("step")
    for place, label in zip(axes[:: len(PANELS)], ROWS.values(), strict=True):
        place.set_ylabel(label)
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    return steps(runs)
