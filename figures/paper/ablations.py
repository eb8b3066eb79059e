"""Ablations of the local support (the paper's figure 6): renormalisation, K and top-p."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import seed_means, select_methods, steps_table
from figures.paper.dynamics import COLUMNS as COLUMNS

CAPTION = (
    "Ablations of the local support objective without a mask: renormalisation, K (8 unless "
    "stated, of 261 ids), and the nucleus of the rollouts (top-p 0.9 unless stated). Top: the "
    "student's entropy on its own rollouts; middle: the score of these rollouts; bottom: accuracy "
    "on held-out problems at top-p 1. Means over seeds with 95 % intervals (Student's t). The "
    "score of a run is measured on rollouts from its own nucleus: a smaller nucleus scores higher "
    "with the same student. The paper uses K of 16, 32 and 48 of 152k ids, shows one of the two "
    "scores per panel, and trains for 400 steps."
)
ROWS = {
    "entropy": "entropy, nats",
    "reward": "train score",
    "accuracy": "held-out accuracy",
}
PANELS = {
    "Renormalisation": {"lsm": "renormalised", "lsm_unnormalised": "not renormalised"},
    "K": {"lsm_k2": "K = 2", "lsm_k4": "K = 4", "lsm": "K = 8"},
    "Nucleus": {"lsm_whole": "top-p 1", "lsm": "top-p 0.9", "lsm_top_p_0.8": "top-p 0.8"},
}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one column an ablation and one row a quantity."""
    table = select_methods(
        table, "single", {method for labels in PANELS.values() for method in labels}
    )
    figure, axes = style.make_panels(len(ROWS), len(PANELS), 4.9, width=width)
    for i, (title, methods) in enumerate(PANELS.items()):
        colours = (
            (style.BLUE, style.RED) if len(methods) == 2 else style.sequential_colors(len(methods))
        )
        for ax, column in zip(axes[i :: len(PANELS)], ROWS, strict=True):
            for (method, label), colour in zip(methods.items(), colours, strict=True):
                mean = seed_means(table[table["method"] == method], column, column == "entropy")
                if len(mean):
                    band = (mean["step"], mean["value"], mean["low"], mean["high"])
                    options: dict[str, Any] = (
                        {"marker": "o", "ms": 3} if column == "accuracy" else {}
                    )
                    style.plot_band(ax, *band, color=colour, label=label, **options)
            if column != "entropy":
                ax.set_ylim(-0.02, 1.02)
        axes[i].set_title(title)
        style.set_log_axis(axes[i])
        axes[i].legend(loc="best")
        axes[-len(PANELS) + i].set_xlabel("step")
    for ax, label in zip(axes[:: len(PANELS)], ROWS.values(), strict=True):
        ax.set_ylabel(label)
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps of the runs."""
    return steps_table(runs)
