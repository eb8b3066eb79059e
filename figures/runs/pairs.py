"""Two model pairs side by side: a toy pair made for its task, and a pair pretrained on text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.runs.lorenz import TOKEN_SHARES

COLUMNS = ("pair", "panel", "series", "step", "x", "y", "low", "high")
CAPTION = (
    "The same diagnostics on two model pairs, both trained with the renormalised teacher top-K "
    "objective. lab: a byte-level student and a teacher with another writing style, built for a "
    "synthetic task. smollm: the teacher is SmolLM2-135M-Instruct, the student 24 of its 30 "
    "layers after 40 steps of fine-tuning, on sums asked in words. First column: both models' "
    "probabilities of 800 tokens sampled at the first step. Second: signal log q − log p by "
    "position at the first step (median with the middle 90 %, and mean with its 95 % interval "
    "over prompts). Third: share of the signal |r| that the largest tokens have, first step "
    "dashed, last solid, with 95 % intervals. Fourth: reverse KL by step, decomposed over the "
    "top-K support S. In the first pair the signal is concentrated on a few tokens, the tag and "
    "the EOS that the teacher writes in another way; in the second it is spread over many. There "
    "16 of 49 152 ids leave about half of the divergence beyond S, where the loss does not see "
    "it, and the student's mass leaves the support during training."
)
PARTS = {
    "binary": ("in or out of S", style.RED),
    "head": ("within S", style.BLUE),
    "tail": ("beyond S", style.ORANGE),
}
NUM_POINTS, MAX_PAIRS = 800, 3


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a pair, with four panels each."""
    names = list(dict.fromkeys(table["pair"]))[:MAX_PAIRS]
    figure, axes = style.make_panels(len(names), 4, 0.6 + 1.9 * len(names), width=width)
    for i, name in enumerate(names):
        pair_rows, is_last = table[table["pair"] == name], i + 1 == len(names)
        row_axes = axes[4 * i : 4 * i + 4]
        for ax, (name_of_panel, panel) in zip(row_axes, PANELS.items(), strict=True):
            panel.draw(ax, pair_rows[pair_rows["panel"] == name_of_panel])
            ax.set(title=panel.title if i == 0 else "", xlabel=panel.label if is_last else "")
        row_axes[0].set_ylabel(f"{name}\nteacher's probability")
        row_axes[1].set_ylabel("log q − log p")
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return figure


def draw_scatter(axes: Any, rows: pd.DataFrame) -> None:
    """Draw both models' probabilities of sampled tokens."""
    axes.plot(rows["x"], rows["y"].clip(lower=1e-12), ".", ms=2, color=style.BLUE, alpha=0.4, mew=0)
    axes.plot([1e-12, 1], [1e-12, 1], color="black", lw=0.6)
    axes.set(xscale="log", yscale="log", xlim=(1e-6, 1.6), ylim=(1e-12, 4))


def draw_gap(axes: Any, rows: pd.DataFrame) -> None:
    """Draw quantiles and mean of log q - log p by position."""
    for series, colour in (("quantiles", style.BLUE), ("mean", style.RED)):
        series_rows = rows[rows["series"] == series].sort_values("x")
        options = {"color": colour, "marker": "o", "ms": 2.5, "label": series}
        style.plot_band(
            axes,
            series_rows["x"],
            series_rows["y"],
            series_rows["low"],
            series_rows["high"],
            **options,
        )
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xscale("log", base=2)
    axes.get_xaxis().set_major_formatter("{x:g}")


def draw_lorenz(axes: Any, rows: pd.DataFrame) -> None:
    """Draw the share of |r| that the largest tokens have, at the first and the last step."""
    steps = sorted(rows["step"].unique())
    for step, dash in zip((steps[0], steps[-1]), ("--", "-"), strict=True):
        step_rows = rows[rows["step"] == step].sort_values("x")
        style.plot_band(
            axes,
            step_rows["x"],
            step_rows["y"],
            step_rows["low"],
            step_rows["high"],
            color=style.BLUE,
            ls=dash,
        )
    axes.plot(TOKEN_SHARES, TOKEN_SHARES, color=style.GREY, lw=1)
    axes.axvline(0.01, color="black", lw=0.6, ls=":")
    axes.set(xscale="log", ylim=(0, 1.01))
    axes.set_xticks([0.001, 0.01, 0.1, 1], [".1 %", "1 %", "10 %", "all"])


def draw_decomposition(axes: Any, rows: pd.DataFrame) -> None:
    """Draw the stacked parts of the KL by step, and their sum with its interval."""
    totals = rows[rows["series"] == "parts"].sort_values("x")
    heights = [rows[rows["series"] == part].sort_values("x")["y"].clip(lower=0) for part in PARTS]
    labels, colours = zip(*PARTS.values(), strict=True)
    axes.stackplot(totals["x"], heights, labels=labels, colors=colours, lw=0)
    style.plot_band(
        axes, totals["x"], totals["y"], totals["low"], totals["high"], color="black", lw=0.8
    )
    axes.set_ylim(bottom=0)


@dataclass(frozen=True)
class Panel:
    """A kind of panel."""

    draw: Callable[[Any, pd.DataFrame], None]
    """Draws the rows of a pair on axes."""
    title: str
    label: str
    """Label of the horizontal axis."""


PANELS = {
    "scatter": Panel(draw_scatter, "Sampled tokens", "student's probability"),
    "gap": Panel(draw_gap, "Signal, nats", "position"),
    "lorenz": Panel(draw_lorenz, "Share of |r|", "largest tokens"),
    "anatomy": Panel(draw_decomposition, "KL, nats per token", "step"),
}


def collect(runs: list[Path]) -> pd.DataFrame:
    """Collect all panels of each pair; a pair is named after its run folder.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.
    """
    from diagnostics.records.run_groups import common_saved_steps, group_by_method
    from diagnostics.stats import round_significant
    from figures.collect.tokens import token_table
    from figures.runs import anatomy as parts
    from figures.runs.lorenz import lorenz_curve

    frames, generator = [], np.random.default_rng(0)
    for name, method_runs in group_by_method(runs).items():
        steps = common_saved_steps(method_runs)
        data = {step: token_table(method_runs, step) for step in sorted({steps[0], steps[-1]})}
        records = sample_probabilities(data[steps[0]], generator) + signal_by_position(
            data[steps[0]], generator
        )
        for step, step_tokens in data.items():
            x, cluster = (
                step_tokens["cost"].abs().to_numpy(float),
                step_tokens["cluster"].to_numpy(),
            )
            for share, *band in zip(
                TOKEN_SHARES, *lorenz_curve(x, cluster, generator), strict=True
            ):
                y, low, high = map(round_significant, band)
                labels = {"panel": "lorenz", "series": "signal", "step": step, "x": share}
                records.append(labels | {"y": y, "low": low, "high": high})
        totals = parts.collect(method_runs)
        totals = totals[totals["first"].isna()]
        for row in totals.itertuples():
            labels = {"panel": "anatomy", "series": row.part, "step": row.step, "x": row.step}
            y, low, high = (round_significant(row.value + z * row.error) for z in (0, -1.96, 1.96))
            records.append(labels | {"y": y, "low": low, "high": high})
        frames.append(pd.DataFrame(records).assign(pair=name))
    return pd.concat(frames, ignore_index=True)[list(COLUMNS)]


def sample_probabilities(
    data: pd.DataFrame, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Return both models' probabilities of NUM_POINTS tokens, sampled without replacement."""
    selected = data.iloc[generator.permutation(len(data))[:NUM_POINTS]]
    p, q = np.exp(selected["student_logp"]), np.exp(selected["teacher_logp"].astype(float))
    labels = {"panel": "scatter", "series": "token", "step": 0}
    return [
        labels | {"x": float(f"{a:.3g}"), "y": float(f"{b:.3g}")} for a, b in zip(p, q, strict=True)
    ]


def signal_by_position(data: pd.DataFrame, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Compute median, middle 90 % and mean with its interval of log q - log p by position bin.

    Args:
        data: A table of tokens.
        generator: Random generator of the bootstrap.

    Returns:
        Two rows a bin with at least 16 tokens of two prompts.
    """
    from diagnostics.stats import bootstrap_interval, round_significant

    records = []
    number = np.floor(np.log2(data["position"].clip(lower=1))).astype(int)
    for bin_number, bin_tokens in data.groupby(number):
        first = 2**bin_number if bin_number else 0
        x = float(np.sqrt((first + 1) * 2 ** (bin_number + 1)))
        signal = -bin_tokens["cost"].astype(float)
        sums = signal.groupby(bin_tokens["cluster"]).agg(["sum", "size"]).to_numpy(float)
        if len(bin_tokens) < 16 or len(sums) < 2:
            continue
        mean = lambda x: x[:, 0].sum() / x[:, 1].sum()  # noqa: E731
        low, high = bootstrap_interval(sums, mean, generator, resamples=1000)
        bands = {"quantiles": signal.quantile([0.5, 0.05, 0.95]), "mean": (mean(sums), low, high)}
        for series, band in bands.items():
            y, a, b = (round_significant(float(v)) for v in band)
            labels = {"panel": "gap", "series": series, "step": 0, "x": round_significant(x)}
            records.append(labels | {"y": y, "low": a, "high": b})
    return records
