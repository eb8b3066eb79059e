"""Heat maps by position and step: which metrics drift, where in the response, and when."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "step", "quantity", "first", "last", "tokens", "value")
CAPTION = (
    "Means over the tokens of a bin of response positions (bins double in width) by step, all "
    "seeds pooled. Each row has one color scale, shared by the methods. The last two rows are "
    "computed from saved batches; a column extends from one of these to the next. Hatched: fewer "
    "than 100 tokens, from few and selected responses. Truncated: share of the bin's tokens that "
    "belong to a response that reached the budget."
)
QUANTITIES = {
    "outside": (
        "divergence/outside_topk_expected",
        "1 − P(S), student's\nmass off the support",
        None,
    ),
    "teacher_entropy": ("divergence/teacher_entropy", "teacher's\nentropy, nats", None),
    "teacher_max": ("divergence/teacher_max", "teacher's largest\nprobability", 1.0),
    "cost": ("divergence/k1", "mean cost r,\nnats", None),
    "cost_95": ("", "95th percentile of\nthe cost, nats", None),
    "cut": ("", "share in truncated\nresponses", None),
}
"""Name to column of the rows (empty if saved batches are needed), label, and largest value."""
MIN_TOKENS, MAX_METHODS = 100, 4


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a quantity and one column a method."""
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    quantities = [q for q in QUANTITIES if (table["quantity"] == q).any()]
    figure, axes = style.make_panels(len(quantities), len(methods), 0.6 + 1.15 * len(quantities), width=width)
    for i, quantity in enumerate(quantities):
        rows = table[(table["quantity"] == quantity) & table["method"].isin(methods)]
        well_sampled = rows[rows["tokens"] >= MIN_TOKENS]["value"]
        well_sampled = rows["value"] if well_sampled.empty else well_sampled
        high = QUANTITIES[quantity][2] or well_sampled.max()
        norm = mpl.colors.Normalize(min(0.0, well_sampled.min()), high)
        if quantity == "teacher_max":
            norm = mpl.colors.Normalize(well_sampled.min(), high)
        row_axes = axes[i * len(methods) : (i + 1) * len(methods)]
        for ax, method in zip(row_axes, methods, strict=True):
            image = draw_heat_map(ax, rows[rows["method"] == method], norm)
            if i == 0:
                ax.set_title(method)
            if ax is not row_axes[0]:
                ax.tick_params(labelleft=False)
            if i + 1 < len(quantities):
                ax.tick_params(labelbottom=False)
            else:
                ax.set_xlabel("step")
        figure.colorbar(image, ax=row_axes, pad=0.01, aspect=9).set_label(
            QUANTITIES[quantity][1], fontsize=6.5
        )
    figure.supylabel("position in the response", fontsize=8)
    return figure


def draw_heat_map(axes: Any, rows: pd.DataFrame, norm: Any) -> Any:
    """Draw one map; columns extend to the next step, positions are on a logarithmic scale."""
    value = rows.pivot_table(index="first", columns="step", values="value", dropna=False)
    tokens = rows.pivot_table(index="first", columns="step", values="tokens").reindex_like(value)
    steps = value.columns.to_numpy(float)
    last_edge = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    positions = [*value.index, int(rows["last"].max()) + 1]
    x, y = np.append(steps, last_edge), np.array(positions, float) + 1
    image = axes.pcolormesh(x, y, value.to_numpy(), norm=norm, cmap="viridis", rasterized=True)
    sparse = np.ma.masked_where(~(tokens.to_numpy() < MIN_TOKENS), np.zeros(value.shape))
    with mpl.rc_context({"hatch.linewidth": 0.4, "hatch.color": "#999999"}):
        overlay_colors = mpl.colors.ListedColormap([(1, 1, 1, 0.35)])
        axes.pcolor(
            x, y, sparse, hatch="/////", cmap=overlay_colors, edgecolor="#999999", linewidth=0
        )
    axes.set_yscale("log", base=2)
    axes.set_ylim(y[-1], y[0])  # first position at the top
    ticks = [first for first in (0, 7, 31, 127, 511, 2047, 8191) if first + 1 < y[-1]]
    axes.set_yticks([first + 1 for first in ticks], [str(first) for first in ticks])
    axes.minorticks_off()
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
        for quantity, (name, _, _) in QUANTITIES.items():
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
