"""Heat maps by position and step: which metrics drift, where in the response, and when."""

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from figures import style
from figures.labels import method_label

COLUMNS = ("method", "runs", "step", "quantity", "first", "last", "tokens", "value")
CAPTION = (
    "Where in the response, and when, do student and teacher drift? Means over the tokens of a bin "
    "of positions (bins double in width) by training step, all seeds pooled; r = log p − log q is "
    "the cost of a token. Each quantity has one color scale, shared by the methods: logarithmic "
    "and linear close to 0. Negative values have the lightest color. The share of the tokens that "
    "belong to a response cut at the budget has a linear scale and is computed from the saved "
    "batches; a column extends from one of these to the next. Hatched: fewer than 100 tokens, from "
    "few and selected responses. Blank: no tokens. Across a page four quantities are drawn, in one "
    "column the first two."
)
QUANTITIES = {
    "outside": "divergence/outside_topk_expected",
    "teacher_entropy": "divergence/teacher_entropy",
    "teacher_max": "divergence/teacher_max",
    "cost": "divergence/k1",
    "cost_95": "",
    "cut": "",
}
"""Column of the rows for each quantity of the table; empty if saved batches are needed."""
LABELS = {
    "outside": "student's mass outside\nteacher's top K",
    "teacher_entropy": "teacher's\nentropy (nats)",
    "cost": "mean cost r\n(nats)",
    "cut": "share of tokens in\ntruncated responses",
}
"""Printed name of each quantity that is drawn. Of the others, the teacher's largest probability
shows what its entropy does, and the 95th percentile of the cost what its mean does."""
COLUMN_QUANTITIES = ("outside", "teacher_entropy")
MIN_TOKENS, MAX_METHODS, DECADES = 100, 4, 3
HATCH_COLOR = "#707070"


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw a block of maps for each quantity, with a map and color scale for all methods."""
    narrow = style.is_column(width)
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    table = table[table["method"].isin(methods)]
    wanted = COLUMN_QUANTITIES if narrow else tuple(LABELS)
    quantities = [q for q in wanted if (table["quantity"] == q).any()]
    columns = min(len(methods), 2 if narrow else MAX_METHODS)
    rows = -(-len(methods) // max(1, columns))  # rows of maps in a block
    height = 0.75 + (1.25 * rows + 0.45 * narrow) * len(quantities)
    figure, axes = style.make_panels(rows * len(quantities), columns, height, width=width)
    for i, quantity in enumerate(quantities):
        block = axes[i * rows * columns : (i + 1) * rows * columns]
        location = "top" if narrow else "right"
        draw_block(figure, block, table[table["quantity"] == quantity], methods, location)
        for j, ax in enumerate(block):
            if j < len(methods) and (i == 0 or rows > 1):
                ax.set_title(fill(method_label(methods[j]), 18, break_on_hyphens=False))
            ax.tick_params(labelleft=j % columns == 0, labelbottom=False)
    for ax in axes[-columns:]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("step")
    figure.supylabel("position in the response (tokens)", fontsize=8)
    if (table["tokens"] < MIN_TOKENS).any():
        sparse = Patch(fc="white", ec=HATCH_COLOR, hatch="/////", lw=0.4)
        label = f"hatched: fewer than {MIN_TOKENS} tokens"
        figure.legend([sparse], [label], loc="outside lower center")
    return figure


def draw_block(
    figure: Figure, block: list[Any], rows: pd.DataFrame, methods: list[str], location: str
) -> None:
    """Draw the maps of a quantity, one a method, and their color bar.

    Args:
        figure: The figure.
        block: Axes of the maps.
        rows: Rows of the quantity.
        methods: Names of the methods.
        location: Side of the color bar, "right" or "top".
    """
    quantity = rows["quantity"].iloc[0]
    norm = color_scale(rows, is_log=quantity != "cut")
    bins = rows[["first", "last"]].drop_duplicates().sort_values("first")
    for ax, method in zip(block, methods, strict=False):
        image = draw_heat_map(ax, rows[rows["method"] == method], bins, norm)
    for ax in block[len(methods) :]:
        ax.set_axis_off()
    extend = "min" if (rows["value"] < norm.vmin).any() else "neither"
    aspect, pad = (11, 0.01) if location == "right" else (30, 0.03)
    bar = figure.colorbar(image, ax=block, location=location, pad=pad, aspect=aspect, extend=extend)
    label = LABELS[quantity]
    bar.set_label(label if location == "right" else label.replace("\n", " "), fontsize=7)
    if isinstance(norm, mpl.colors.SymLogNorm):
        bar.set_ticks(log_ticks(norm.linthresh, float(norm.vmax or 1)))
        bar.ax.minorticks_off()
    bar.formatter = StrMethodFormatter("{x:g}")
    bar.ax.tick_params(labelsize=7)


def log_ticks(low: float, high: float) -> list[float]:
    """Return 0 and the powers of ten of a range; their double and fivefold too if it is short."""
    factors = (1, 2, 5) if high / low < 30 else (1,)
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    return [0.0, *sorted(x * f for x in powers for f in factors if low <= x * f <= high)]


def color_scale(rows: pd.DataFrame, is_log: bool) -> Any:
    """Return the scale of a quantity, from 0 to its largest well-sampled value.

    A logarithmic one is linear below DECADES under this value, so that it includes 0.
    """
    values = rows[rows["tokens"] >= MIN_TOKENS]["value"].dropna()
    values = rows["value"].dropna() if values.empty else values
    positive, high = values[values > 0], values.max()
    if is_log and len(positive) and positive.min() < high:
        low = max(positive.min(), high / 10**DECADES)
        return mpl.colors.SymLogNorm(low, linscale=0.2, vmin=0, vmax=high)
    return mpl.colors.Normalize(0, 1 if not high > 0 or high <= 1 else high)


def draw_heat_map(axes: Any, rows: pd.DataFrame, bins: pd.DataFrame, norm: Any) -> Any:
    """Draw one map: its columns extend to the next step, and its bins are equally high.

    Args:
        axes: Axes to draw on.
        rows: Rows of one quantity and method.
        bins: First and last position of all bins, sorted.
        norm: Color scale.

    Returns:
        The image, for a color bar.
    """
    value = rows.pivot_table(index="first", columns="step", values="value", dropna=False)
    value = value.reindex(bins["first"])
    tokens = rows.pivot_table(index="first", columns="step", values="tokens").reindex_like(value)
    steps = value.columns.to_numpy(float)
    last_edge = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    x, y = np.append(steps, last_edge), np.arange(len(bins) + 1) - 0.5
    image = axes.pcolormesh(x, y, value.to_numpy(), norm=norm, cmap="magma_r", rasterized=True)
    sparse = np.ma.masked_where(~(tokens.to_numpy() < MIN_TOKENS), np.zeros(value.shape))
    with mpl.rc_context({"hatch.linewidth": 0.4, "hatch.color": HATCH_COLOR}):
        overlay = mpl.colors.ListedColormap([(1, 1, 1, 0)])
        axes.pcolor(x, y, sparse, hatch="/////", cmap=overlay, edgecolor=HATCH_COLOR, linewidth=0)
    axes.set_ylim(y[-1], y[0])  # first position at the top
    shown = bins.iloc[:: max(1, -(-len(bins) // 5))]
    ticks = [list(bins["first"]).index(first) for first in shown["first"]]
    names = [f"{row.first:g}–{row.last:g}" for row in shown.itertuples()]
    axes.set_yticks(ticks, names, fontsize=7)
    axes.grid(visible=False)
    return image


def collect(runs: list[Path]) -> pd.DataFrame:
    """Compute all quantities by position bin, with all runs of a method pooled.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS for every step that all runs of a method have; two of the quantities
        only for the steps whose batches they saved.
    """
    from diagnostics.records.run_groups import group_by_method

    parts = []
    for method, method_runs in group_by_method(runs).items():
        values = pd.concat(
            [means_from_rows(method_runs), values_from_batches(method_runs)], ignore_index=True
        )
        values.insert(0, "method", method)
        values.insert(1, "runs", len(method_runs))
        parts.append(values)
    return pd.concat(parts, ignore_index=True)


def means_from_rows(runs: list[Path]) -> pd.DataFrame:
    """Average the position bins of the rows over runs, weighted by their number of tokens."""
    from diagnostics.records.rows import position_bin_values
    from diagnostics.records.run_folder import RunFolder
    from diagnostics.stats import round_significant

    records = []
    for steps in zip(*(RunFolder(run).rows() for run in runs), strict=False):
        counts = [position_bin_values(row, "divergence/tokens") for row in steps]
        for quantity, name in QUANTITIES.items():
            values = [position_bin_values(row, name) for row in steps] if name else []
            for edge in sorted({edge for bin_values in values for edge in bin_values}):
                pairs = [
                    (bin_values[edge], count.get(edge, 0.0))
                    for bin_values, count in zip(values, counts, strict=True)
                    if edge in bin_values
                ]
                value, tokens = np.array(pairs).T
                records.append(
                    {
                        "step": steps[0]["step"],
                        "quantity": quantity,
                        "first": edge[0],
                        "last": edge[1],
                        "tokens": tokens.sum(),
                        "value": round_significant((value * tokens).sum() / tokens.sum()),
                    }
                )
    return pd.DataFrame(records)


def values_from_batches(runs: list[Path]) -> pd.DataFrame:
    """Compute the 95th percentile of the cost and the share of truncated tokens at saved steps."""
    from diagnostics.records.run_groups import common_saved_steps
    from diagnostics.stats import round_significant
    from figures.collect.tokens import token_table

    records = []
    for step in common_saved_steps(runs):
        data = token_table(runs, step)
        first = 2 ** np.floor(np.log2(data["position"].clip(lower=1))).astype(int)
        first = first.where(data["position"] > 1, 0)
        for low, bin_tokens in data.groupby(first):
            labels = {
                "step": step,
                "first": low,
                "last": max(1, 2 * low - 1),
                "tokens": len(bin_tokens),
            }
            cost, truncated = bin_tokens["cost"].quantile(0.95), 1 - bin_tokens["ended"].mean()
            records.append(labels | {"quantity": "cost_95", "value": round_significant(cost)})
            records.append(labels | {"quantity": "cut", "value": round_significant(truncated)})
    return pd.DataFrame(records)
