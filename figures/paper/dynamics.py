"""Training curves of the main methods on one task (the paper's figures A4 and A6)."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.steps import STEP_COLUMNS, chosen, over_seeds, steps

COLUMNS = STEP_COLUMNS
CAPTION = (
    "Along training on one task: mean over seeds with a 95 % interval (Student's t; geometric "
    "where the axis is logarithmic). Held-out accuracy is at top-p 1; the rest is on fresh "
    "rollouts. The gap is the mean of log q - log p over sampled and supervised tokens; gradient "
    "norms are before clipping at 1; repeated tokens are in an 8-gram that was there before. Local "
    "support draws its rollouts from the nucleus of 0.9, as in the paper, so that its train score "
    "and its gap are about those. The paper has 400 steps of one seed, responses of up to 16k "
    "tokens, and no panel of repetition."
)
METHODS = {
    "sampled": ("sampled token", style.RED, "-"),
    "sampled_mask": ("sampled token, mask", style.RED, "--"),
    "lsm": ("local support", style.BLUE, "-"),
    "lsm_mask": ("local support, mask", style.BLUE, "--"),
}
PANELS = {
    "reward": "Train score",
    "accuracy": "Held-out accuracy",
    "truncated": "Cut at the budget",
    "length": "Length, tokens",
    "entropy": "Entropy, nats",
    "grad_norm": "Gradient norm",
    "gap": "Gap, nats",
    "repeated": "Repeated tokens",
}
LOG, SHARES = ("entropy", "grad_norm"), ("reward", "accuracy", "truncated")
COLUMNS_OF_PANELS = 4


def draw(table: pd.DataFrame) -> Figure:
    """PANELS of the group "single"."""
    figure, axes = style.panels(2, COLUMNS_OF_PANELS, 3.7)
    all_panels(axes, chosen(table, "single", METHODS))
    finish(figure, axes)
    return figure


def all_panels(axes: list[Any], table: pd.DataFrame) -> None:
    """PANELS of one task."""
    table = table.assign(gap=-table["cost"])
    for place, (column, title) in zip(axes, PANELS.items(), strict=True):
        for method, (label, colour, dash) in METHODS.items():
            mean = over_seeds(table[table["method"] == method], column, column in LOG)
            if len(mean):
                how = {"color": colour, "ls": dash, "lw": 1.1, "label": label}
                how |= {"marker": "o", "ms": 3} if column == "accuracy" else {}
                style.curve(place, mean["step"], mean["value"], mean["low"], mean["high"], **how)
        place.set_title(title)
        if column in LOG:
            style.log_axis(place)
        if column in SHARES:
            place.set_ylim(-0.03, 1.03)


def finish(figure: Figure, axes: list[Any]) -> None:
    """The legend below, and what the lowest axes show."""
    for place in axes[-COLUMNS_OF_PANELS:]:
        place.set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS))


def collect(runs: list[Path]) -> pd.DataFrame:
    return steps(runs)
