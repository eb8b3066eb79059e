"""Relative bias and relative noise of every estimator."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("quantity", "estimator", "gamma", "sampler", "ratio", "length", "value", "low", "high")
CAPTION = (
    "Estimators of the gradient of the sequence KL J: distance of their mean from ∇J, and variance "
    "of one trajectory's estimate, both relative to ∇J, sorted by bias. γ: discount of later "
    "costs; mean costs: costs are replaced by their means over tokens; top K: K = 2 of 16 tokens; "
    "k1, k2, k3: differentiated estimators of the KL; weights: importance weights per token or per "
    "sequence where another sampler generated the responses. Medians over random tabular worlds "
    "with random response lengths; bars, mostly narrower than the points: 95 % bootstrap "
    "intervals. In one column a selection, with the "
    "teacher's top K alone."
)
DEFAULT = {"sampler": "student", "ratio": "none", "length": "sequence_sum"}
UNBIASED = 1e-9
"""Relative bias that is due to rounding alone."""
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
    column = style.is_column(width)
    figure, (bias, noise) = style.make_panels(1, 2, 7.6 if column else 8.6, width=width)
    order = rank_estimators(table)
    if column:
        order = order[[is_selected(row) for row in order.itertuples()]]
        order["label"] = [shorten(label) for label in order["label"]]
    draw_values(bias, table, order, "bias")
    bias.set_xscale("symlog", linthresh=0.1)
    bias.set_xlim(-0.01, max(10, 1.3 * order["high"].max()))
    bias.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    unbiased = f"{(order['value'] < UNBIASED).sum()} of {len(order)}"
    draw_values(noise, table, order, "variance")
    noise.set(xscale="log", yticklabels=[])
    label_powers(noise, 5 if column else 3)
    if column:
        bias.set_title(f"{unbiased}\nunbiased")
        noise.set_title("Variance")
        bias.set_xlabel("‖E g − ∇J‖\n/ ‖∇J‖")
        noise.set_xlabel("variance\n/ ‖∇J‖²")
    else:
        bias.set_title(f"Relative bias: 0 for {unbiased}")
        noise.set_title("Relative variance")
        bias.set_xlabel("relative bias ‖E g − ∇J‖ / ‖∇J‖")
        noise.set_xlabel("variance of one trajectory / ‖∇J‖²")
    for label, color in (
        ("sampled from the student, summed over the response", style.BLUE),
        ("another sampler, or a mean per response", style.RED),
    ):
        noise.plot([], [], "o", ms=2.5, color=color, label=label)
    handles = noise.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=1 if column else 2)
    return figure


def is_selected(row: Any) -> bool:
    """Return whether one column has a row: one or two of every kind of estimator."""
    if row.length != DEFAULT["length"]:
        return bool(row.gamma == 1)
    if row.sampler != DEFAULT["sampler"]:
        return bool(row.gamma == 1 or row.ratio == "none")
    at = {"plain": (0.0, 0.9, 1.0), "rb_all_value": (0.0, 1.0), "value": (1.0,)}
    if row.estimator in at:
        return row.gamma in at[row.estimator]
    local = is_local(row.estimator) and not row.estimator.startswith("student")
    return local or (row.estimator == "kl_advantage" and row.gamma == 0)


def is_local(key: str) -> bool:
    """Return whether an estimator has no later costs to discount."""
    return "topk" in key or key in ("k1", "k2", "k3", "full_reverse_kl")


def shorten(label: str) -> str:
    """Return a label for one column, where all top-K forms are the teacher's."""
    label = label.removeprefix("teacher's ").replace("temperature", "temp.")
    return label.replace(", ", ",\n", 1) if label.startswith("sampled reverse") else label


def label_powers(axes: Any, step: int) -> None:
    """Label every `step`-th power of ten on the horizontal axis."""
    low, high = np.log10(axes.get_xlim())
    first = int(np.ceil(low / step)) * step
    powers = range(first, int(np.floor(high)) + 1, step)
    if len(powers) > 1:
        axes.set_xticks([10.0**power for power in powers])
    axes.xaxis.minorticks_off()


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
    if not is_local(key):
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
    for selected, color in ((is_default, style.BLUE), ([not x for x in is_default], style.RED)):
        part = ranked_values[selected]
        spread = [(part["value"] - part["low"]).clip(lower=0), part["high"] - part["value"]]
        axes.errorbar(part["value"], y[selected], xerr=spread, fmt="o", ms=2.5, lw=0.8, color=color)
    axes.set_yticks(y, order["label"], fontsize=7, linespacing=1.05)
    axes.set_ylim(-1, len(order))


def estimator_name(key: str) -> str:
    """Return an estimator's printed name; a top-K form names its support first."""
    if key in NAMES:
        return NAMES[key]
    support, topk, form = key.partition("_topk")
    if not topk:
        return key.replace("_", " ")
    return f"{support}'s top K, {form_name(form.removeprefix('_') or 'renormalised')}"


def estimator_title(key: str) -> str:
    """Return an estimator's printed name with a capital first letter."""
    name = estimator_name(key)
    return name[0].upper() + name[1:]


def form_name(form: str) -> str:
    """Return the printed name of a form of a top-K loss."""
    return FORMS.get(form) or NAMES.get(form) or form.replace("_", " ")
