"""Decomposition of the KL over a top-K support: support against rest, within it, and beyond it."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from diagnostics.errors import InvalidInput
from figures import style
from figures.labels import method_label

COLUMNS = ("method", "runs", "step", "first", "last", "part", "tokens", "value", "error")
CAPTION = (
    "Exact decomposition of the reverse KL, in nats per token, over a top-K support S: between S "
    "and the rest (in or out of S: the student's mass off it), within S, and beyond S (an "
    "unbiased estimate from sampled tokens). One row a method, all panels on the same logarithmic "
    "scale: by step, and by position in the response at the first (across a page) and the last "
    "step (bins double in width and have at least 100 tokens). Black: the sum of the three parts "
    "with its 95 % interval over prompts. Values below 0.001 are not drawn. Titles: share of the "
    "KL within S at the last step. A renormalised top-K loss sees only the part within S."
)
PARTS = {
    "binary": ("in or out of S", style.RED, "s"),
    "head": ("within S", style.BLUE, "o"),
    "tail": ("beyond S", style.ORANGE, "^"),
}
MIN_TOKENS, MAX_METHODS = 100, 4
LOWEST = 1e-3
"""Lower end of the axis in nats per token."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: by step, then by position at the first and the last step.

    One column leaves out the positions at the first step, which are those of the student before
    training.
    """
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    num_columns = 2 if style.is_column(width) else 3
    height = 0.9 + 1.65 * len(methods)
    figure, axes = style.make_panels(len(methods), num_columns, height, width=width)
    firsts = sorted(table.loc[table["tokens"] >= MIN_TOKENS, "first"].dropna().unique())
    for i, method in enumerate(methods):
        rows = table[table["method"] == method]
        panels = axes[num_columns * i : num_columns * (i + 1)]
        draw_steps(panels[0], rows[rows["first"].isna()])
        panels[0].set_ylabel("nats per token")
        panels[0].set_title(panel_title(rows[rows["first"].isna()]))
        binned = rows[rows["first"].notna() & (rows["tokens"] >= MIN_TOKENS)]
        steps = sorted(binned["step"].unique())
        shown_steps = (steps[0], steps[-1])[-(num_columns - 1) :]
        for ax, step in zip(panels[1:], shown_steps, strict=True):
            draw_bins(ax, binned[binned["step"] == step], firsts)
            ax.set_title(f"by position, step {step:g}", fontweight="normal")
            ax.tick_params(labelleft=False)
    set_axes(axes, num_columns, float(table["value"].max()))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if num_columns == 3 else 2)
    return figure


def panel_title(totals: pd.DataFrame) -> str:
    """Return the method, and the share of the KL within the support at the last step."""
    label = textwrap.fill(method_label(totals["method"].iloc[0]), 20, break_on_hyphens=False)
    last = totals[totals["step"] == totals["step"].max()].set_index("part")["value"]
    return f"{label}\nwithin S: {100 * last['head'] / last['parts']:.0f} %"


def set_axes(axes: list[Any], num_columns: int, highest: float) -> None:
    """Give all panels the same logarithmic scale, and the lowest ones their labels."""
    for ax in axes:
        ax.set(yscale="log", ylim=(LOWEST, 2 * max(highest, 10 * LOWEST)))
        ax.yaxis.set_major_locator(LogLocator(numticks=4))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    for i, ax in enumerate(axes[-num_columns:]):
        ax.set_xlabel("first position of the bin" if i else "step")


def draw_steps(axes: Any, rows: pd.DataFrame) -> None:
    """Draw the sum with its interval and the parts by step."""
    totals = rows[rows["part"] == "parts"].sort_values("step")
    error = 1.96 * totals["error"]
    low, high = (totals["value"] - error).clip(lower=LOWEST), totals["value"] + error
    options: dict[str, Any] = {"color": "black", "lw": 1.6, "label": "sum, 95 % interval"}
    style.plot_band(axes, totals["step"], totals["value"], low, high, **options)
    for part, (label, colour, mark) in PARTS.items():
        part_rows = rows[(rows["part"] == part) & (rows["value"] > 0)].sort_values("step")
        x, y = part_rows["step"], part_rows["value"]
        options = {"marker": mark, "ms": 3, "markevery": 5, "lw": 1.1}
        axes.plot(x, y, color=colour, label=label, **options)


def draw_bins(axes: Any, rows: pd.DataFrame, firsts: list[float]) -> None:
    """Draw the sum with its interval and the parts by position bin, beside each other."""
    places = {first: i for i, first in enumerate(firsts)}
    totals = rows[rows["part"] == "parts"]
    x = totals["first"].map(places)
    error = 1.96 * totals["error"]
    low = np.minimum(error, totals["value"] - LOWEST).clip(lower=0)
    axes.errorbar(x, totals["value"], yerr=[low, error], fmt="k_", ms=8, mew=1.4, lw=0.8)
    for i, (part, (_, colour, mark)) in enumerate(PARTS.items()):
        part_rows = rows[(rows["part"] == part) & (rows["value"] > 0)]
        x = part_rows["first"].map(places) + 0.22 * (i - 1)
        axes.plot(x, part_rows["value"], mark, ms=3, color=colour)
    axes.set_xlim(-0.6, len(firsts) - 0.4)
    shown = range(0, len(firsts), 2 if len(firsts) > 5 else 1)
    axes.set_xticks(shown, [f"{firsts[i]:g}" for i in shown])
    axes.grid(axis="x", visible=False)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Compute the parts and their sum at every step, and by position at the first and last step.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS, the runs of a method pooled by their number of tokens.
    """
    from diagnostics.records.rows import position_bin_values
    from diagnostics.records.run_folder import RunFolder
    from diagnostics.records.run_groups import group_by_method
    from diagnostics.stats import pool_means, round_significant

    records = []
    for method, method_runs in group_by_method(runs).items():
        steps = list(zip(*(RunFolder(run).rows() for run in method_runs), strict=False))
        name = support_prefix(dict(steps[0][0]), method_runs[0])
        for i, step in enumerate(steps):
            counts = [row["divergence/tokens"] for row in step]
            labels = {"method": method, "runs": len(method_runs), "step": step[0]["step"]}
            for part in (*PARTS, "parts"):
                key = f"{name}_{part}"
                value, error = pool_means(
                    [row[key] for row in step], [row[f"{key}_se"] for row in step], counts
                )
                records.append(
                    labels
                    | {"part": part, "tokens": sum(counts)}
                    | {"value": round_significant(value), "error": round_significant(error)}
                )
                if i not in (0, len(steps) - 1):
                    continue
                bin_counts = [position_bin_values(row, "divergence/tokens") for row in step]
                values = [position_bin_values(row, key) for row in step]
                errors = [
                    position_bin_values(
                        {k[:-3]: v for k, v in row.items() if k.endswith("_se")}, key
                    )
                    for row in step
                ]
                for edge in values[0]:
                    indices = [j for j, v in enumerate(values) if edge in v]
                    tokens = [bin_counts[j][edge] for j in indices]
                    value, error = pool_means(
                        [values[j][edge] for j in indices],
                        [errors[j][edge] for j in indices],
                        tokens,
                    )
                    records.append(
                        labels
                        | {"part": part, "first": edge[0], "last": edge[1], "tokens": sum(tokens)}
                        | {"value": round_significant(value), "error": round_significant(error)}
                    )
    return pd.DataFrame(records, columns=list(COLUMNS))


def support_prefix(row: dict[str, Any], run: Path) -> str:
    """Return the common prefix of the part metrics in a row, such as divergence/kl.

    Args:
        row: A row of a run.
        run: Its run folder, for the error message.

    Returns:
        The prefix.

    Raises:
        InvalidInput: The objective of the run has no support.
    """
    prefixes = [key.removesuffix("_parts") for key in row if key.endswith("kl_parts")]
    if not prefixes:
        raise InvalidInput(
            f"{run} has no top-K support: its rows have no divergence/kl_parts; leave it out"
        )
    return prefixes[0]
