"""Student entropy against divergence: which prefixes carry the signal and the energy."""

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.labels import method_label

COLUMNS = ("method", "runs", "step", "kind", "quadrant", "x", "y", "tokens", "share", "low", "high")
CAPTION = (
    "Which prefixes carry the gradient? Sampled tokens by the student's entropy and the divergence "
    "KL(p ‖ q) at their prefix, at the first saved training step and the last; color: number of "
    "tokens. Lines: 80th percentile of each axis at the first step, which divide the prefixes into "
    "four quadrants: student sure or undecided, teacher agrees or disagrees. In each corner, the "
    "quadrant's share of the tokens, and in red of the gradient energy, the sum of "
    "r² ‖1_y − p‖² with r = log p − log q (squared norm of a token's gradient by the logits), "
    "with a 95 % bootstrap interval over prompts. Bold: the quadrant with most of the energy. "
    "Prior work attributes most of the gradient to the few tokens at the top left, where a sure "
    "student meets a disagreeing teacher."
)
BIN_EDGES = np.geomspace(1e-5, 30, 45)
"""Cell edges in nats, for both axes; values beyond them are counted in the outermost cells."""
MAX_METHODS, ENERGY_COLOR = 3, style.RED
PAGE_Y_AXIS = (1e-8, 1e5), [1e-4, 1e-2, 1]
COLUMN_Y_AXIS = (3e-12, 1e9), [1e-4, 1]
"""Limits, wide enough for the texts in the corners, and ticks."""
QUADRANTS = {
    "decided, apart": (True, False),
    "undecided, apart": (False, False),
    "decided, near": (True, True),
    "undecided, near": (False, True),
}
"""Quadrant to whether its text is on the left, and whether at the bottom."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: its first step and its last."""
    narrow = style.is_column(width)
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    table = table[table["method"].isin(methods)]
    height = (1.8 if narrow else 1.2) + 1.9 * len(methods)
    figure, axes = style.make_panels(len(methods), 2, height, width=width)
    separator = "\n" if narrow else " "
    norm = mpl.colors.LogNorm(1, max(2, table["tokens"].max()))
    for i, method in enumerate(methods):
        method_rows = table[table["method"] == method]
        steps = sorted(method_rows["step"].unique())
        for ax, step in zip(axes[2 * i : 2 * i + 2], (steps[0], steps[-1]), strict=True):
            rows = method_rows[method_rows["step"] == step]
            image = draw_panel(ax, rows, norm)
            write_shares(ax, rows, narrow)
            limits, ticks = COLUMN_Y_AXIS if narrow else PAGE_Y_AXIS
            ax.set(ylim=limits, yticks=ticks)
            title = f"{method_label(method)}, step\u00a0{step:g}"
            ax.set_title(fill(title, 16 if narrow else 60, break_on_hyphens=False))
            ax.set_xlim(entropy_limits(table))
            ax.tick_params(labelbottom=i + 1 == len(methods), labelleft=ax is axes[2 * i])
        axes[2 * i].set_ylabel("KL(p ‖ q) (nats)\nagree ← → disagree")
    for ax in axes[-2:]:
        ax.set_xlabel(f"student's entropy{separator}(nats)\nsure ← → undecided")
    location = "bottom" if narrow else "right"
    bar = figure.colorbar(image, ax=axes, aspect=45, pad=0.02, location=location)
    bar.set_label("tokens in a cell")
    add_legend(figure, axes[0], narrow)
    return figure


def entropy_limits(table: pd.DataFrame) -> tuple[float, float]:
    """Return the range of the entropies of all cells, a cell wider on both sides."""
    x = table[table["kind"] == "cell"]["x"]
    step = BIN_EDGES[1] / BIN_EDGES[0]
    return x.min() / step, x.max() * step**2


def draw_panel(axes: Any, rows: pd.DataFrame, norm: Any) -> Any:
    """Draw counts on a logarithmic grid, and the thresholds."""
    cells = rows[rows["kind"] == "cell"]
    counts = np.full((len(BIN_EDGES) - 1,) * 2, np.nan)
    indices = (np.searchsorted(BIN_EDGES, cells[name], side="right") - 1 for name in ("y", "x"))
    counts[tuple(indices)] = cells["tokens"]
    image = axes.pcolormesh(
        BIN_EDGES, BIN_EDGES, counts, norm=norm, cmap="viridis_r", rasterized=True
    )
    corners = rows[rows["kind"].isin(["tokens", "energy"])]
    axes.axvline(corners["x"].iloc[0], color="black", lw=0.7)
    axes.axhline(corners["y"].iloc[0], color="black", lw=0.7)
    axes.set(xscale="log", yscale="log")
    axes.minorticks_off()
    return image


def write_shares(axes: Any, rows: pd.DataFrame, narrow: bool) -> None:
    """Write each quadrant's shares of the tokens and of the energy into its corner."""
    shares = rows[rows["kind"].isin(["tokens", "energy"])].set_index(["kind", "quadrant"])
    largest = shares.loc["energy"]["share"].idxmax()
    for name, (is_left, is_bottom) in QUADRANTS.items():
        share, low, high = shares.loc[("energy", name), ["share", "low", "high"]] * 100
        tokens = 100 * shares.loc[("tokens", name), "share"]
        lines = [
            (f"{tokens:.0f} %" + ("" if narrow else " tokens"), "black"),
            (f"{share:.0f} %" + ("" if narrow else " energy"), ENERGY_COLOR),
            (f"[{low:.0f}, {high:.0f}]", ENERGY_COLOR),
        ]
        for line, (text, color) in enumerate(reversed(lines) if is_bottom else lines):
            axes.annotate(
                text,
                (0 if is_left else 1, 0 if is_bottom else 1),
                xycoords="axes fraction",
                xytext=(3 if is_left else -3, (3 + 9 * line) * (1 if is_bottom else -1)),
                textcoords="offset points",
                ha="left" if is_left else "right",
                va="bottom" if is_bottom else "top",
                fontsize=7,
                color=color,
                bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.3},
                fontweight="bold" if name == largest else "normal",
            )


def add_legend(figure: Figure, axes: Any, narrow: bool) -> None:
    """Explain the lines and the shares below the panels; `axes` are any to make handles with."""
    labels = {
        "lines: 80th percentiles at the first step": "black",
        "share of the tokens": "black",
        "share of the gradient energy [95 % interval]": ENERGY_COLOR,
        "bold: most of the energy": "black",
    }
    handles = [axes.plot([], [], " ")[0] for _ in labels]
    handles[0].set(linestyle="-", color="black", linewidth=0.7)
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=1 if narrow else 2, labelspacing=0.3
    )
    for text, color in zip(legend.get_texts(), labels.values(), strict=True):
        text.set_color(color)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Compute grid counts and quadrant shares at the first and last step that all runs saved.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.
    """
    from diagnostics.records.run_groups import common_saved_steps, group_by_method
    from diagnostics.stats import round_significant
    from figures.collect.tokens import shares_by_kind, token_table

    records, generator = [], np.random.default_rng(0)
    for method, method_runs in group_by_method(runs).items():
        steps = common_saved_steps(method_runs)
        first = token_table(method_runs, steps[0])
        x, y = (
            round_significant(first[c].quantile(0.8)) for c in ("student_entropy", "reverse_kl")
        )
        for step in sorted({steps[0], steps[-1]}):
            data = first if step == steps[0] else token_table(method_runs, step)
            labels = {"method": method, "runs": len(method_runs), "step": step}
            records += [labels | cell for cell in count_grid_cells(data)]
            kinds = assign_quadrants(data, x, y)
            unit_weight = pd.Series(1.0, index=data.index)
            for kind, weight in (("tokens", unit_weight), ("energy", data["energy"])):
                shares = shares_by_kind(data, kinds, weight, generator)
                for quadrant in QUADRANTS:
                    share, low, high = map(round_significant, shares.get(quadrant, (0.0, 0.0, 0.0)))
                    keys = {"kind": kind, "quadrant": quadrant, "x": x, "y": y}
                    records.append(labels | keys | {"share": share, "low": low, "high": high})
    return pd.DataFrame(records)


def assign_quadrants(data: pd.DataFrame, x: float, y: float) -> pd.Series:
    """Assign tokens to quadrants: entropy above x is "undecided", divergence above y is "apart"."""
    confidence = np.where(data["student_entropy"] > x, "undecided", "decided")
    agreement = np.where(data["reverse_kl"] > y, "apart", "near")
    return pd.Series(
        [f"{a}, {b}" for a, b in zip(confidence, agreement, strict=True)], index=data.index
    )


def count_grid_cells(data: pd.DataFrame) -> list[dict[str, Any]]:
    """Count the tokens in each cell of the logarithmic grid, named by its lower edges."""
    columns = ("student_entropy", "reverse_kl")
    i, j = (
        (np.searchsorted(BIN_EDGES, data[name], side="right") - 1).clip(0, len(BIN_EDGES) - 2)
        for name in columns
    )
    counts = pd.Series(1, index=pd.MultiIndex.from_arrays([i, j])).groupby(level=[0, 1]).sum()
    return [
        {"kind": "cell", "x": float(f"{BIN_EDGES[a] * 1.0001:.5g}"), "tokens": int(n)}
        | {"y": float(f"{BIN_EDGES[b] * 1.0001:.5g}")}
        for (a, b), n in counts.items()
    ]
