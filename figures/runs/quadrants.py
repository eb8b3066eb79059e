"""Entropy against divergence: which prefixes carry the signal and the energy."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "step", "kind", "quadrant", "x", "y", "tokens", "share", "low", "high")
CAPTION = (
    "Tokens by the student's entropy and by the divergence KL(p ‖ q) at their prefix; colour: "
    "number of tokens. Lines: the upper fifth of each at the first step shown. In each quadrant: "
    "its share of the tokens, and of the energy r² |1_y − p|² with a 95 % bootstrap interval over "
    "prompts. Top left, where the student is decided and the teacher disagrees, is where others "
    "find few tokens with nearly all that matters."
)
EDGES = np.geomspace(1e-5, 30, 45)
"""Nats, of both axes; what is smaller or larger is counted at the border."""
MOST = 3


def draw(table: pd.DataFrame) -> Figure:
    """A row a method, its first step and its last."""
    methods = list(dict.fromkeys(table["method"]))[:MOST]
    figure, axes = style.panels(len(methods), 2, 0.6 + 2.3 * len(methods))
    norm = mpl.colors.LogNorm(1, max(2, table["tokens"].max()))
    for i, method in enumerate(methods):
        mine = table[table["method"] == method]
        steps = sorted(mine["step"].unique())
        for place, step in zip(axes[2 * i : 2 * i + 2], (steps[0], steps[-1]), strict=True):
            image = panel(place, mine[mine["step"] == step], norm)
            place.set_title(f"{method}, step {step:g}")
            if i + 1 == len(methods):
                place.set_xlabel("student's entropy, nats")
        axes[2 * i].set_ylabel("KL(p ‖ q), nats")
    figure.colorbar(image, ax=axes, aspect=30, pad=0.01).set_label("tokens")
    return figure


def panel(axes: Any, rows: pd.DataFrame, norm: Any) -> Any:
    """Counts on a log grid, the thresholds, and what the four quadrants hold."""
    cells = rows[rows["kind"] == "cell"]
    counts = np.full((len(EDGES) - 1,) * 2, np.nan)
    at = (np.searchsorted(EDGES, cells[name], side="right") - 1 for name in ("y", "x"))
    counts[tuple(at)] = cells["tokens"]
    image = axes.pcolormesh(EDGES, EDGES, counts, norm=norm, cmap="viridis_r", rasterized=True)
    corners = rows[rows["kind"].isin(["tokens", "energy"])]
    x, y = corners["x"].iloc[0], corners["y"].iloc[0]
    axes.axvline(x, color="black", lw=0.7)
    axes.axhline(y, color="black", lw=0.7)
    for name, (left, bottom) in PLACES.items():
        texts = []
        for kind in ("tokens", "energy"):
            one = corners[(corners["kind"] == kind) & (corners["quadrant"] == name)]
            share, low, high = one[["share", "low", "high"]].to_numpy()[0] * 100
            span = f" [{low:.0f}, {high:.0f}]" if kind == "energy" else ""
            texts.append(f"{share:.0f} % {kind}{span}")
        axes.text(
            0.02 if left else 0.98,
            0.03 if bottom else 0.97,
            "\n".join(texts),
            transform=axes.transAxes,
            ha="left" if left else "right",
            va="bottom" if bottom else "top",
            fontsize=6.5,
            bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1},
        )
    axes.set(xscale="log", yscale="log", xlim=EDGES[[0, -1]], ylim=(2e-8, 3e4))
    axes.set_yticks([1e-4, 1e-2, 1])
    axes.minorticks_off()
    return image


PLACES = {
    "decided, apart": (True, False),
    "undecided, apart": (False, False),
    "decided, near": (True, True),
    "undecided, near": (False, True),
}
"""Quadrant: whether its text stands left, whether below."""


def collect(runs: list[Path]) -> pd.DataFrame:
    """Grid counts and quadrants at the first and the last step that all runs of a method saved."""
    from diagnostics.records.run_folders import methods, saved, short
    from figures.collect.tokens import shares, tokens

    records, generator = [], np.random.default_rng(0)
    for method, mine in methods(runs).items():
        steps = saved(mine)
        first = tokens(mine, steps[0])
        x, y = (short(first[c].quantile(0.8)) for c in ("student_entropy", "reverse_kl"))
        for step in sorted({steps[0], steps[-1]}):
            data = first if step == steps[0] else tokens(mine, step)
            about = {"method": method, "runs": len(mine), "step": step}
            records += [about | cell for cell in grid(data)]
            kinds = quadrants(data, x, y)
            one = pd.Series(1.0, index=data.index)
            for kind, weight in (("tokens", one), ("energy", data["energy"])):
                found = shares(data, kinds, weight, generator)
                for quadrant in PLACES:
                    share, low, high = map(short, found.get(quadrant, (0.0, 0.0, 0.0)))
                    here = {"kind": kind, "quadrant": quadrant, "x": x, "y": y}
                    records.append(about | here | {"share": share, "low": low, "high": high})
    return pd.DataFrame(records)


def quadrants(data: pd.DataFrame, x: float, y: float) -> pd.Series:
    """Which quadrant each token is in: entropy above x is undecided, divergence above y apart."""
    sure = np.where(data["student_entropy"] > x, "undecided", "decided")
    apart = np.where(data["reverse_kl"] > y, "apart", "near")
    return pd.Series([f"{a}, {b}" for a, b in zip(sure, apart, strict=True)], index=data.index)


def grid(data: pd.DataFrame) -> list[dict[str, Any]]:
    """Cells of the log grid that hold tokens, by their lower edges."""
    columns = ("student_entropy", "reverse_kl")
    i, j = (
        (np.searchsorted(EDGES, data[name], side="right") - 1).clip(0, len(EDGES) - 2)
        for name in columns
    )
    counts = pd.Series(1, index=pd.MultiIndex.from_arrays([i, j])).groupby(level=[0, 1]).sum()
    return [
        {"kind": "cell", "x": float(f"{EDGES[a] * 1.0001:.5g}"), "tokens": int(n)}
        | {"y": float(f"{EDGES[b] * 1.0001:.5g}")}
        for (a, b), n in counts.items()
    ]
