"""Relative bias and relative noise of every estimator."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("quantity", "estimator", "gamma", "sampler", "ratio", "length", "value", "low", "high")
DEFAULT = {"sampler": "student", "ratio": "none", "length": "sequence_sum"}
NAMES = {
    "plain": "sampled reverse KL",
    "kl_advantage": "KL as advantage",
    "leave_one_out": "leave-one-out baseline",
    "local_kl": "local-KL baseline",
    "optimal": "optimal baseline",
    "position_value": "position baseline",
    "value": "value baseline",
    "rb_immediate": "mean immediate cost",
    "rb_future": "mean future costs",
    "rb_all": "mean costs",
    "rb_all_value": "mean costs, value baseline",
    "full_reverse_kl": "full reverse KL",
}
"""The printed name of each estimator that is not a top-K form or one of k1, k2 and k3."""
FORMS = {
    "renormalised": "renormalised",
    "and_sampled": "with sampled token",
    "unnormalised": "un-normalised",
    "stopped": "stop-gradient head",
    "bucket": "tail bucket",
    "sampled_tail": "sampled tail",
    "published_tail": "published tail",
}
"""The printed name of each form of a loss on a top-K support."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw two panels of points with intervals: relative bias, and relative variance."""
    figure, (bias, noise) = style.make_panels(1, 2, 8.6, width=width)
    order = rank_estimators(table)
    draw_values(bias, table, order, "bias")
    bias.set_xscale("symlog", linthresh=0.1)
    bias.set(xlabel="relative bias ‖E g − ∇J‖ / ‖∇J‖", xlim=(-0.005, 10))
    bias.set_title("Relative bias")
    draw_values(noise, table, order, "variance")
    noise.set(xscale="log", xlabel="variance of one trajectory / ‖∇J‖²", yticklabels=[])
    noise.set_title("Relative variance")
    for label, colour in (
        ("sampled from the student, summed over the response", style.BLUE),
        ("another sampler, or a mean per response", style.RED),
    ):
        noise.plot([], [], "o", ms=2.5, color=colour, label=label)
    figure.legend(*noise.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def rank_estimators(table: pd.DataFrame) -> pd.DataFrame:
    """Select the estimators to draw and sort them by bias; adds the column `label`."""
    rows = table[table["quantity"] == "bias"].copy()
    family = rows["gamma"].isin([0.0, 1.0]) | (rows["gamma"] == 0.9) & (
        rows["estimator"] == "plain"
    )
    rows = rows[family]
    rows["label"] = [estimator_label(row) for row in rows.itertuples()]
    return rows.sort_values("value")


def estimator_label(row: Any) -> str:
    """Return an estimator's label: name, discount, sampler, weights and length reduction."""
    key = str(row.estimator)
    text = estimator_name(key)
    local = "topk" in key or key in ("k1", "k2", "k3", "full_reverse_kl")
    if not local:
        text += f"  γ={row.gamma:g}"
    if row.sampler != "student":
        text += ", " + row.sampler.replace("top_p", "top-p")
        text += "" if row.ratio == "none" else f", {row.ratio} weights"
    return text + (", per-response mean" if row.length == "sequence_mean" else "")


def draw_values(axes: Any, table: pd.DataFrame, order: pd.DataFrame, quantity: str) -> None:
    """Draw a quantity of every estimator in the given order; the default setting is blue."""
    keys = ["estimator", "gamma", "sampler", "ratio", "length"]
    values = table[table["quantity"] == quantity].set_index(keys)
    ranked_values = values.loc[pd.MultiIndex.from_frame(order[keys])]
    y = np.arange(len(order))
    is_default = [
        tuple(r) == tuple(DEFAULT.values())
        for r in order[["sampler", "ratio", "length"]].to_numpy()
    ]
    for selected, colour in ((is_default, style.BLUE), ([not x for x in is_default], style.RED)):
        part = ranked_values[selected]
        spread = [(part["value"] - part["low"]).clip(lower=0), part["high"] - part["value"]]
        axes.errorbar(
            part["value"], y[selected], xerr=spread, fmt="o", ms=2.5, lw=0.8, color=colour
        )
    axes.set_yticks(y, order["label"], fontsize=7)
    axes.set_ylim(-1, len(order))


def estimator_name(key: str) -> str:
    """Return an estimator's printed name; a top-K form names its support first."""
    if key in NAMES:
        return NAMES[key]
    support, topk, form = key.partition("_topk")
    if not topk:
        return key.replace("_", " ")
    return f"{support}'s top K, {form_name(form.removeprefix('_') or 'renormalised')}"


def form_name(form: str) -> str:
    """Return the printed name of a form of a top-K loss."""
    return FORMS.get(form) or NAMES.get(form) or form.replace("_", " ")
