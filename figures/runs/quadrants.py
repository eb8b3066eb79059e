"""Student entropy against divergence: which prefixes carry the signal and the energy."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "step", "kind", "quadrant", "x", "y", "tokens", "share", "low", "high")
CAPTION = (
    "Sampled tokens by the student's entropy and the divergence KL(p ‖ q) at their prefix, at the "
    "first saved step (left) and the last (right); color: number of tokens. Lines: 80th "
    "percentile of each axis at the first step. Text in each quadrant: its share of the tokens, "
    "and of the energy r² |1_y − p|² with a 95 % bootstrap interval over prompts. Top left: "
    "confident student, disagreeing teacher; prior work attributes most of the gradient to these "
    "few tokens."
)
BIN_EDGES = np.geomspace(1e-5, 30, 45)
"""Cell edges in nats, for both axes; values beyond them are counted in the outermost cells."""
MAX_METHODS = 3


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: its first step and its last."""
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    figure, axes = style.make_panels(len(methods), 2, 0.6 + 2.3 * len(methods), width=width)
    norm = mpl.colors.LogNorm(1, max(2, table["tokens"].max()))
    for i, method in enumerate(methods):
        method_rows = table[table["method"] == method]
        steps = sorted(method_rows["step"].unique())
        for ax, step in zip(axes[2 * i : 2 * i + 2], (steps[0], steps[-1]), strict=True):
            image = draw_panel(ax, method_rows[method_rows["step"] == step], norm)
            ax.set_title(f"{method}, step {step:g}")
            if i + 1 == len(methods):
                ax.set_xlabel("student's entropy, nats")
        axes[2 * i].set_ylabel("KL(p ‖ q), nats")
    figure.colorbar(image, ax=axes, aspect=30, pad=0.01).set_label("tokens")
    return figure


def draw_panel(axes: Any, rows: pd.DataFrame, norm: Any) -> Any:
    """Draw counts on a logarithmic grid, the thresholds, and the shares of the four quadrants."""
    cells = rows[rows["kind"] == "cell"]
    counts = np.full((len(BIN_EDGES) - 1,) * 2, np.nan)
    indices = (np.searchsorted(BIN_EDGES, cells[name], side="right") - 1 for name in ("y", "x"))
    counts[tuple(indices)] = cells["tokens"]
    image = axes.pcolormesh(
        BIN_EDGES, BIN_EDGES, counts, norm=norm, cmap="viridis_r", rasterized=True
    )
    corners = rows[rows["kind"].isin(["tokens", "energy"])]
    x, y = corners["x"].iloc[0], corners["y"].iloc[0]
    axes.axvline(x, color="black", lw=0.7)
    axes.axhline(y, color="black", lw=0.7)
    for name, (is_left, is_bottom) in QUADRANTS.items():
        texts = []
        for kind in ("tokens", "energy"):
            row = corners[(corners["kind"] == kind) & (corners["quadrant"] == name)]
            share, low, high = row[["share", "low", "high"]].to_numpy()[0] * 100
            span = f" [{low:.0f}, {high:.0f}]" if kind == "energy" else ""
            texts.append(f"{share:.0f} % {kind}{span}")
        axes.text(
            0.02 if is_left else 0.98,
            0.03 if is_bottom else 0.97,
            "\n".join(texts),
            transform=axes.transAxes,
            ha="left" if is_left else "right",
            va="bottom" if is_bottom else "top",
            fontsize=6.5,
            bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1},
        )
    axes.set(xscale="log", yscale="log", xlim=BIN_EDGES[[0, -1]], ylim=(2e-8, 3e4))
    axes.set_yticks([1e-4, 1e-2, 1])
    axes.minorticks_off()
    return image


QUADRANTS = {
    "decided, apart": (True, False),
    "undecided, apart": (False, False),
    "decided, near": (True, True),
    "undecided, near": (False, True),
}
"""Quadrant to whether its text is on the left, and whether at the bottom."""


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
