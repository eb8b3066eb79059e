"""Both models' probabilities of the tokens that the student sampled (the paper's figure 2)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from figures import style

COLUMNS = ("kind", "student", "teacher", "share", "low", "high")
CAPTION = (
    "Probabilities that the student (p) and the teacher (q) give to 2,500 of the tokens that the "
    "student sampled at the first step, on linear axes as in the paper and on logarithmic axes, "
    "which show the small probabilities. A point below the line p = q is a token that the student "
    "overrates. Excluded: the student is sure of the token (p > 0.9) and the teacher excludes it "
    "(q < 1e-4). Shares: of all sampled tokens, with 95 % bootstrap intervals over prompts; "
    "signal: the sum of |log q - log p|; upward signal: of log q - log p where it is positive. "
    "The paper prints no shares. Its models write mathematics, these write worked sums of digits."
)
KINDS = {
    "rest": ("other tokens", style.BLUE, 2.0),
    "repeated": ("in a repeated 8-gram", style.ORANGE, 3.0),
    "impossible": ("excluded by the teacher", style.RED, 3.0),
}
SHARES = {
    "below the line": "tokens with p > q",
    "impossible tokens": "excluded: of the tokens",
    "impossible, of the signal": "excluded: of the signal",
    "top 1 %, of the upward signal": "top 1 % of the tokens:\nof the upward signal",
}
"""Printed name of each share; those of excluded tokens have the color of these tokens."""
NUM_POINTS = 2500
MIN_PROBABILITY = 1e-10


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the same points on linear and on logarithmic axes, and the shares with intervals."""
    narrow = style.is_column(width)
    figure = Figure(figsize=(width, 4.2 if narrow else 3.0), layout="constrained")
    shape: dict[str, Any] = {"nrows": 2, "ncols": 1, "height_ratios": [1.6, 1]}
    if not narrow:
        shape = {"nrows": 1, "ncols": 2, "width_ratios": [1.5, 1]}
    parts: Any = figure.subfigures(**shape)
    top, bottom = parts
    linear, logarithmic = top.subplots(1, 2)
    draw_points(linear, table[table["share"].isna()], "linear")
    draw_points(logarithmic, table[table["share"].isna()], "log")
    linear.set_ylabel("teacher's probability q")
    draw_shares(bottom.subplots(), table)
    handles, labels = linear.get_legend_handles_labels()
    top.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=1.6)
    return figure


def draw_points(axes: Any, points: pd.DataFrame, scale: str) -> None:
    """Draw the tokens on axes of the given scale, and the line of equal probabilities."""
    for kind, (label, colour, size) in KINDS.items():
        kind_points = points[points["kind"] == kind]
        y = kind_points["teacher"].clip(lower=MIN_PROBABILITY)
        options: dict[str, Any] = {"ms": size, "mew": 0, "alpha": 0.5, "label": label}
        axes.plot(kind_points["student"], y, "o", color=colour, **options)
    ends = [MIN_PROBABILITY, 1] if scale == "log" else [0, 1]
    axes.plot(ends, ends, color="black", lw=0.7, label="p = q")
    axes.set(xscale=scale, yscale=scale, xlabel="student's prob. p")
    if scale == "log":
        axes.set(xlim=(1e-5, 2.5), ylim=(MIN_PROBABILITY / 2, 4), xticks=(1e-4, 1))
        axes.set_yticks((1e-8, 1e-4, 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
    else:
        axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.set_title("Logarithmic" if scale == "log" else "Linear")


def draw_shares(axes: Any, table: pd.DataFrame) -> None:
    """Draw each share with its interval and its value in percent."""
    for i, row in enumerate(share_rows(table)):
        excluded = row.kind.startswith("impossible")
        value, low, high = (100 * x for x in (row.share, row.low, row.high))
        axes.barh(i, value, 0.6, color=style.RED if excluded else "#BBBBBB")
        axes.plot([low, high], [i, i], color="#333333", lw=1)
        axes.text(high + 3, i, f"{value:.3g} %", va="center", fontsize=style.MIN_FONT_SIZE)
    names = [SHARES.get(row.kind, row.kind) for row in share_rows(table)]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 119), xticks=(0, 50, 100), xlabel="share, %")
    shares = {row.kind: f"{100 * row.share:.2g} %" for row in share_rows(table)}
    if {"impossible tokens", "impossible, of the signal"} <= set(shares):
        few, much = shares["impossible tokens"], shares["impossible, of the signal"]
        axes.set_title(f"{few} of the tokens: {much} of the signal", x=1, ha="right")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


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
