"""Both models' probabilities of the tokens that the student sampled (the paper's figure 2)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("kind", "student", "teacher", "share", "low", "high")
CAPTION = (
    "Probabilities that both models give to the tokens sampled at the first step; left on linear "
    "axes as in the paper, right on logarithmic axes, which show the small probabilities. A point "
    "below the line is a token that the student overrates. Shares have 95 % bootstrap intervals "
    "over prompts; the signal is |log q - log p|. The paper prints no shares. Its models write "
    "mathematics, these write worked sums of digits."
)
KINDS = {
    "rest": ("other tokens", style.BLUE, 2.0),
    "repeated": ("in a repeated 8-gram", style.ORANGE, 3.0),
    "impossible": ("student sure, teacher excludes", style.RED, 3.0),
}
NUM_POINTS = 2500
MIN_PROBABILITY = 1e-10


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the same points on linear and on logarithmic axes, with the shares as text."""
    figure, axes = style.make_panels(1, 2, 3.3, width=width)
    points = table[table["share"].isna()]
    for ax, scale in zip(axes, ("linear", "log"), strict=True):
        for kind, (label, colour, size) in KINDS.items():
            kind_points = points[points["kind"] == kind]
            y = kind_points["teacher"].clip(lower=MIN_PROBABILITY)
            options: dict[str, Any] = {"ms": size, "mew": 0, "alpha": 0.5, "label": label}
            ax.plot(kind_points["student"], y, "o", color=colour, **options)
        ends = [MIN_PROBABILITY, 1] if scale == "log" else [0, 1]
        ax.plot(ends, ends, color="black", lw=0.7)
        ax.set(xscale=scale, yscale=scale, xlabel="student's probability")
    axes[0].set_ylabel("teacher's probability")
    axes[1].set(xlim=(1e-5, 1.6), ylim=(MIN_PROBABILITY / 2, 3))
    lines = [f"{r.kind}: {r.share:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in share_rows(table)]
    axes[1].text(0.03, 0.03, "\n".join(lines), transform=axes[1].transAxes, fontsize=6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, markerscale=1.6)
    return figure


def share_rows(table: pd.DataFrame) -> list[Any]:
    """Return the rows of the table that are shares."""
    return list(table[table["share"].notna()].itertuples())


def collect(runs: list[Path]) -> pd.DataFrame:
    """Sample the tokens of the runs' first batch, and compute shares over all of them.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS: the shares first, then NUM_POINTS sampled tokens.
    """
    from diagnostics.records.run_groups import common_saved_steps
    from figures.collect.tokens import token_table

    generator = np.random.default_rng(0)
    data = token_table(runs, common_saved_steps(runs)[0])
    kind = np.where(
        data["impossible"], "impossible", np.where(data["repeated"], "repeated", "rest")
    )
    selected = np.sort(generator.permutation(len(data))[:NUM_POINTS])
    points = pd.DataFrame(
        {
            "kind": kind[selected],
            "student": np.exp(data["student_logp"].to_numpy(float)[selected]),
            "teacher": np.exp(data["teacher_logp"].to_numpy(float)[selected]),
        }
    ).map(lambda x: float(f"{x:.3g}") if isinstance(x, float) else x)
    cost = data["cost"].astype(float)
    upward_signal = (-cost).clip(lower=0)
    largest = upward_signal >= upward_signal.quantile(0.99)
    intervals = {
        "below the line": ratio_interval(data, (cost > 0).astype(float), None, generator),
        "impossible tokens": ratio_interval(
            data, data["impossible"].astype(float), None, generator
        ),
        "impossible, of the signal": ratio_interval(
            data, cost.abs() * data["impossible"], cost.abs(), generator
        ),
        "top 1 %, of the upward signal": ratio_interval(
            data, upward_signal * largest, upward_signal, generator
        ),
    }
    rows = [
        {"kind": name, "share": value, "low": low, "high": high}
        for name, (value, low, high) in intervals.items()
    ]
    return pd.concat([pd.DataFrame(rows), points], ignore_index=True)[list(COLUMNS)]


def ratio_interval(
    data: pd.DataFrame,
    numerator: pd.Series,
    denominator: pd.Series | None,
    generator: np.random.Generator,
) -> tuple[float, ...]:
    """Compute a ratio of sums with a 95 % bootstrap interval over prompts.

    Args:
        data: A table of tokens.
        numerator: (N,) values.
        denominator: (N,) values; None to divide by the number of tokens.
        generator: Random generator of the bootstrap.

    Returns:
        (ratio, low, high).
    """
    from diagnostics.stats import bootstrap_interval

    weights = pd.Series(1.0, index=data.index) if denominator is None else denominator
    sums = (
        pd.DataFrame({"a": numerator, "b": weights}).groupby(data["cluster"]).sum().to_numpy(float)
    )

    def statistic(x: np.ndarray) -> np.ndarray:
        return x[:, 0].sum() / x[:, 1].sum()

    low, high = bootstrap_interval(sums, statistic, generator, resamples=1000)
    return tuple(float(f"{x:.4g}") for x in (statistic(sums), low, high))
