"""Both models' probabilities of the tokens that the student sampled (the paper's figure 2)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("kind", "student", "teacher", "share", "low", "high")
CAPTION = (
    "Tokens sampled at the first step, by both models' probabilities of them; left as in the "
    "paper, right on logarithmic axes, where what matters is seen. A point below the line is a "
    "token that the student overrates. Shares have 95 % intervals over prompts (bootstrap); the "
    "signal is |log q - log p|. The paper prints no shares. Its pair writes mathematics, this one "
    "digits of a worked sum."
)
KINDS = {
    "rest": ("other tokens", style.BLUE, 2.0),
    "repeated": ("in a repeated 8-gram", style.ORANGE, 3.0),
    "impossible": ("sure for the student, impossible for the teacher", style.RED, 3.0),
}
SHOWN = 2500
LOWEST = 1e-10


def draw(table: pd.DataFrame) -> Figure:
    """Two panels of the same points, the shares in between."""
    figure, axes = style.panels(1, 2, 3.3)
    points = table[table["share"].isna()]
    for place, scale in zip(axes, ("linear", "log"), strict=True):
        for kind, (label, colour, size) in KINDS.items():
            mine = points[points["kind"] == kind]
            y = mine["teacher"].clip(lower=LOWEST)
            how: dict[str, Any] = {"ms": size, "mew": 0, "alpha": 0.5, "label": label}
            place.plot(mine["student"], y, "o", color=colour, **how)
        ends = [LOWEST, 1] if scale == "log" else [0, 1]
        place.plot(ends, ends, color="black", lw=0.7)
        place.set(xscale=scale, yscale=scale, xlabel="student's probability")
    axes[0].set_ylabel("teacher's probability")
    axes[1].set(xlim=(1e-5, 1.6), ylim=(LOWEST / 2, 3))
    lines = [f"{r.kind}: {r.share:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in shares(table)]
    axes[1].text(0.03, 0.03, "\n".join(lines), transform=axes[1].transAxes, fontsize=6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, markerscale=1.6)
    return figure


def shares(table: pd.DataFrame) -> list[Any]:
    return list(table[table["share"].notna()].itertuples())


def collect(runs: list[Path]) -> pd.DataFrame:
    """A sample of the tokens of the runs' first batch, and shares over all of them."""
    from diagnostics.records.run_folders import saved
    from figures.collect.tokens import tokens

    generator = np.random.default_rng(0)
    data = tokens(runs, saved(runs)[0])
    kind = np.where(
        data["impossible"], "impossible", np.where(data["repeated"], "repeated", "rest")
    )
    chosen = np.sort(generator.permutation(len(data))[:SHOWN])
    points = pd.DataFrame(
        {
            "kind": kind[chosen],
            "student": np.exp(data["student_logp"].to_numpy(float)[chosen]),
            "teacher": np.exp(data["teacher_logp"].to_numpy(float)[chosen]),
        }
    ).map(lambda x: float(f"{x:.3g}") if isinstance(x, float) else x)
    cost = data["cost"].astype(float)
    up = (-cost).clip(lower=0)
    largest = up >= up.quantile(0.99)
    wanted = {
        "below the line": ratio(data, (cost > 0).astype(float), None, generator),
        "impossible tokens": ratio(data, data["impossible"].astype(float), None, generator),
        "impossible, of the signal": ratio(
            data, cost.abs() * data["impossible"], cost.abs(), generator
        ),
        "top 1 %, of the upward signal": ratio(data, up * largest, up, generator),
    }
    rows = [
        {"kind": name, "share": value, "low": low, "high": high}
        for name, (value, low, high) in wanted.items()
    ]
    return pd.concat([pd.DataFrame(rows), points], ignore_index=True)[list(COLUMNS)]


def ratio(
    data: pd.DataFrame, above: pd.Series, below: pd.Series | None, generator: np.random.Generator
) -> tuple[float, ...]:
    """sum above / sum below (or the count), with a bootstrap interval over prompts."""
    from diagnostics.stats import bootstrap_interval

    whole = pd.Series(1.0, index=data.index) if below is None else below
    sums = pd.DataFrame({"a": above, "b": whole}).groupby(data["cluster"]).sum().to_numpy(float)

    def statistic(x: np.ndarray) -> np.ndarray:
        return x[:, 0].sum() / x[:, 1].sum()

    low, high = bootstrap_interval(sums, statistic, generator, resamples=1000)
    return tuple(float(f"{x:.4g}") for x in (statistic(sums), low, high))
