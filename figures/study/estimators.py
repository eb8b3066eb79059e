"""Every estimator on one plane: relative bias against relative noise."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("quantity", "estimator", "gamma", "sampler", "ratio", "length", "value", "low", "high")
OWN = {"sampler": "student", "ratio": "none", "length": "sequence_sum"}


def draw(table: pd.DataFrame) -> Figure:
    """Two panels of bars: relative bias of every estimator, and its relative noise."""
    figure, (bias, noise) = style.panels(1, 2, 7.4)
    order = ranked(table)
    bars(bias, table, order, "bias")
    bias.set_xscale("symlog", linthresh=0.1)
    bias.set(xlabel="relative bias ‖E g − ∇J‖ / ‖∇J‖", xlim=(-0.005, 4))
    bias.set_title("What is it biased by?")
    bars(noise, table, order, "variance")
    noise.set(xscale="log", xlabel="variance of one trajectory / ‖∇J‖²", yticklabels=[])
    noise.set_title("and how noisy is it?")
    return figure


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The estimators that are shown, most biased at the top; labels in the column `label`."""
    rows = table[table["quantity"] == "bias"].copy()
    family = rows["gamma"].isin([0.0, 1.0]) | (rows["gamma"] == 0.9) & (
        rows["estimator"] == "plain"
    )
    rows = rows[family]
    rows["label"] = [label(row) for row in rows.itertuples()]
    return rows.sort_values("value")


def label(row: Any) -> str:
    text = str(row.estimator)
    local = "topk" in text or text in ("k1", "k2", "k3", "full_reverse_kl")
    if not local:
        text += f"  γ={row.gamma:g}"
    if row.sampler != "student":
        text += f", {row.sampler}"
        text += "" if row.ratio == "none" else f", {row.ratio} weights"
    return text + (", per-response mean" if row.length == "sequence_mean" else "")


def bars(axes: Any, table: pd.DataFrame, order: pd.DataFrame, quantity: str) -> None:
    keys = ["estimator", "gamma", "sampler", "ratio", "length"]
    values = table[table["quantity"] == quantity].set_index(keys)
    at = values.loc[pd.MultiIndex.from_frame(order[keys])]
    y = np.arange(len(order))
    own = [
        tuple(r) == tuple(OWN.values()) for r in order[["sampler", "ratio", "length"]].to_numpy()
    ]
    for chosen, colour in ((own, style.BLUE), ([not x for x in own], style.RED)):
        part = at[chosen]
        spread = [(part["value"] - part["low"]).clip(lower=0), part["high"] - part["value"]]
        axes.errorbar(part["value"], y[chosen], xerr=spread, fmt="o", ms=2.5, lw=0.8, color=colour)
    axes.set_yticks(y, order["label"], fontsize=5)
    axes.set_ylim(-1, len(order))
