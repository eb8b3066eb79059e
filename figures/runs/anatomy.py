"""Decomposition of the KL over a top-K support: support against rest, within it, and beyond it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("method", "runs", "step", "first", "last", "part", "tokens", "value", "error")
CAPTION = (
    "Exact decomposition of the reverse KL, in nats per token, over a top-K support S: between S "
    "and the rest (the student's mass off the support), within S, and beyond S (an unbiased "
    "estimate from sampled tokens). Left: by step. Middle and right: by position in the response "
    "at the first and the last step (bins double in width and have at least 100 tokens). Black: "
    "the sum with its 95 % interval over prompts. A renormalised top-K loss sees only the part "
    "within S."
)
PARTS = {
    "binary": ("in or out of the support", style.RED),
    "head": ("within the support", style.BLUE),
    "tail": ("beyond the support", style.ORANGE),
}
MIN_TOKENS, MAX_METHODS = 100, 4


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: by step, then by position at the first and the last step."""
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    figure, axes = style.make_panels(len(methods), 3, 0.7 + 1.65 * len(methods), width=width)
    for i, method in enumerate(methods):
        method_rows = table[table["method"] == method]
        totals, binned = (
            method_rows[method_rows["first"].isna()],
            method_rows[method_rows["first"].notna()],
        )
        total_ax, *bin_axes = axes[3 * i : 3 * i + 3]
        x = np.array(sorted(totals["step"].unique()), float)
        draw_stack(total_ax, totals, x, "step")
        total_ax.set(ylabel="nats per token", xlabel="step" if i + 1 == len(methods) else "")
        total_ax.set_title(method)
        steps = sorted(binned["step"].unique())
        for ax, step in zip(bin_axes, (steps[0], steps[-1]), strict=True):
            bins = binned[(binned["step"] == step) & (binned["tokens"] >= MIN_TOKENS)]
            firsts = sorted(bins["first"].unique())
            draw_stack(ax, bins, np.arange(len(firsts), dtype=float), "first")
            ax.set_xticks(range(len(firsts)), [f"{first:g}" for first in firsts], fontsize=6.5)
            ax.set_title(f"step {step:g}", fontweight="normal")
            if i + 1 == len(methods):
                ax.set_xlabel("first position of the bin")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def draw_stack(axes: Any, rows: pd.DataFrame, x: Any, index_column: str) -> None:
    """Draw the parts stacked, and their sum with its interval.

    Args:
        axes: Axes to draw on.
        rows: Rows of one method, and of one step if drawn by position.
        x: Horizontal coordinates.
        index_column: "step" for filled areas, "first" for bars by position.
    """
    parts = rows.pivot_table(index=index_column, columns="part", values="value").reindex(
        columns=[*PARTS]
    )
    heights = [parts[part].to_numpy() for part in PARTS]
    labels, colours = zip(*PARTS.values(), strict=True)
    totals = rows[rows["part"] == "parts"].sort_values(index_column)
    error = 1.96 * totals["error"].to_numpy()
    if index_column == "step":
        axes.stackplot(x, np.maximum(heights, 0), labels=labels, colors=colours, lw=0)
        style.plot_band(
            axes, x, totals["value"], totals["value"] - error, totals["value"] + error, c="k"
        )
        axes.lines[-1].set(lw=1, label="sum")
        axes.margins(x=0)
    else:
        bottom = np.zeros(len(x))
        for height, colour in zip(heights, colours, strict=True):
            axes.bar(x, height, 0.85, bottom=bottom, color=colour)
            bottom = bottom + np.maximum(height, 0)
        axes.errorbar(x, totals["value"], yerr=error, fmt="k.", ms=3, lw=0.8)
        axes.grid(axis="x", visible=False)
    axes.axhline(0, color="black", lw=0.5)


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
