"""Position x step heat maps: what drifts, where in the response, and when."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "step", "quantity", "first", "last", "tokens", "value")
CAPTION = (
    "Means over the tokens of a bin of response positions (bins double in width), step by step, "
    "all seeds together; one colour scale a row, shared by the methods. The last two rows are of "
    "saved batches, a column from one of them to the next. Hatched: fewer than 100 tokens, which "
    "speak for few, selected responses. Cut short: share of the bin's tokens that belong to a "
    "response that ran into the budget."
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
    "cost_95": ("", "upper 5 % of\nthe cost, nats", None),
    "cut": ("", "tokens of responses\ncut short", None),
}
"""Name, column of the rows ("" where a saved batch is needed), label, largest value shown."""
THIN, MOST = 100, 4


def draw(table: pd.DataFrame) -> Figure:
    """A row a quantity, a column a method."""
    methods = list(dict.fromkeys(table["method"]))[:MOST]
    shown = [q for q in QUANTITIES if (table["quantity"] == q).any()]
    figure, axes = style.panels(len(shown), len(methods), 0.6 + 1.15 * len(shown))
    for i, quantity in enumerate(shown):
        rows = table[(table["quantity"] == quantity) & table["method"].isin(methods)]
        thick = rows[rows["tokens"] >= THIN]["value"]
        thick = rows["value"] if thick.empty else thick
        high = QUANTITIES[quantity][2] or thick.max()
        norm = mpl.colors.Normalize(min(0.0, thick.min()), high)
        if quantity == "teacher_max":
            norm = mpl.colors.Normalize(thick.min(), high)
        here = axes[i * len(methods) : (i + 1) * len(methods)]
        for place, method in zip(here, methods, strict=True):
            image = tiles(place, rows[rows["method"] == method], norm)
            if i == 0:
                place.set_title(method)
            if place is not here[0]:
                place.tick_params(labelleft=False)
            if i + 1 < len(shown):
                place.tick_params(labelbottom=False)
            else:
                place.set_xlabel("step")
        figure.colorbar(image, ax=here, pad=0.01, aspect=9).set_label(
            QUANTITIES[quantity][1], fontsize=6.5
        )
    figure.supylabel("position in the response", fontsize=8)
    return figure


def tiles(axes: Any, rows: pd.DataFrame, norm: Any) -> Any:
    """One map; steps are as wide as the gap to the next one, positions on a log scale."""
    value = rows.pivot_table(index="first", columns="step", values="value", dropna=False)
    tokens = rows.pivot_table(index="first", columns="step", values="tokens").reindex_like(value)
    steps = value.columns.to_numpy(float)
    wide = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    positions = [*value.index, int(rows["last"].max()) + 1]
    x, y = np.append(steps, wide), np.array(positions, float) + 1
    image = axes.pcolormesh(x, y, value.to_numpy(), norm=norm, cmap="viridis", rasterized=True)
    thin = np.ma.masked_where(~(tokens.to_numpy() < THIN), np.zeros(value.shape))
    with mpl.rc_context({"hatch.linewidth": 0.4, "hatch.color": "#999999"}):
        clear = mpl.colors.ListedColormap([(1, 1, 1, 0.35)])
        axes.pcolor(x, y, thin, hatch="/////", cmap=clear, edgecolor="#999999", linewidth=0)
    axes.set_yscale("log", base=2)
    axes.set_ylim(y[-1], y[0])  # downwards, as one reads
    ticks = [first for first in (0, 7, 31, 127, 511, 2047, 8191) if first + 1 < y[-1]]
    axes.set_yticks([first + 1 for first in ticks], [str(first) for first in ticks])
    axes.minorticks_off()
    axes.grid(visible=False)
    return image


def collect(runs: list[Path]) -> pd.DataFrame:
    """Every step that all runs of a method have, and of two quantities every saved one."""
    from diagnostics.records.run_folders import methods

    parts = []
    for method, mine in methods(runs).items():
        found = pd.concat([of_rows(mine), of_batches(mine)], ignore_index=True)
        found.insert(0, "method", method)
        found.insert(1, "runs", len(mine))
        parts.append(found)
    return pd.concat(parts, ignore_index=True)


def of_rows(runs: list[Path]) -> pd.DataFrame:
    """Means of the bins over runs, weighted by their tokens."""
    from diagnostics.records.run_folders import bins, recorded_rows, short

    records = []
    for steps in zip(*(recorded_rows(run) for run in runs), strict=False):
        counts = [bins(row, "divergence/tokens") for row in steps]
        for quantity, (name, _, _) in QUANTITIES.items():
            found = [bins(row, name) for row in steps] if name else []
            for edge in sorted({edge for one in found for edge in one}):
                pairs = [
                    (one[edge], count.get(edge, 0.0))
                    for one, count in zip(found, counts, strict=True)
                    if edge in one
                ]
                value, tokens = np.array(pairs).T
                records.append(
                    {
                        "step": steps[0]["step"],
                        "quantity": quantity,
                        "first": edge[0],
                        "last": edge[1],
                        "tokens": tokens.sum(),
                        "value": short((value * tokens).sum() / tokens.sum()),
                    }
                )
    return pd.DataFrame(records)


def of_batches(runs: list[Path]) -> pd.DataFrame:
    """The cost's 95th percentile and the share of cut responses' tokens, at saved steps."""
    from diagnostics.records.run_folders import saved, short
    from figures.collect.tokens import tokens

    records = []
    for step in saved(runs):
        data = tokens(runs, step)
        first = 2 ** np.floor(np.log2(data["position"].clip(lower=1))).astype(int)
        first = first.where(data["position"] > 1, 0)
        for low, some in data.groupby(first):
            about = {"step": step, "first": low, "last": max(1, 2 * low - 1), "tokens": len(some)}
            cost, cut = some["cost"].quantile(0.95), 1 - some["ended"].mean()
            records.append(about | {"quantity": "cost_95", "value": short(cost)})
            records.append(about | {"quantity": "cut", "value": short(cut)})
    return pd.DataFrame(records)
