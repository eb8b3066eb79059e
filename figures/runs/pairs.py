"""Two model pairs side by side: a toy pair made for its task, and a pair pretrained on text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from figures import style
from figures.labels import pair_label
from figures.runs.lorenz import TOKEN_SHARES

COLUMNS = ("pair", "panel", "series", "step", "x", "y", "low", "high")
CAPTION = (
    "The same diagnostics on two model pairs (one column each), both trained with the renormalised "
    "objective on the teacher's top-K support S; p is the student, q the teacher. Lab pair: a "
    "byte-level student and a teacher with another writing style, built for a synthetic task. "
    "SmolLM2 pair: the teacher is SmolLM2-135M-Instruct, the student 24 of its 30 layers after 40 "
    "steps of fine-tuning, on sums asked in words. From top to bottom: both models' probabilities "
    "of 800 tokens sampled at the first step; signal log q − log p by position at the first step "
    "(median with the middle 90 % of the tokens, and mean with its 95 % interval over prompts); "
    "share of the signal |r| = |log p − log q| that the largest tokens have, with 95 % intervals; "
    "reverse KL by training step, decomposed over S, with the 95 % interval of the sum. In the "
    "lab pair the signal is concentrated on a few tokens, the tag and the EOS that the teacher "
    "writes in another way; in the SmolLM2 pair it is spread over many. There 16 of 49 152 ids "
    "leave about half of the divergence beyond S, where the loss does not see it, and the "
    "student's mass leaves the support during training."
)
PARTS = {
    "binary": ("between S and the rest", style.RED),
    "head": ("within S (teacher's top K)", style.BLUE),
    "tail": ("beyond S", style.ORANGE),
}
NUM_POINTS, MAX_PAIRS = 800, 3
TOP_SHARE, FAR_RATIO = 0.01, 100


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one column a pair and one row a kind of panel; legends right of it or below all."""
    narrow = style.is_column(width)
    names = list(dict.fromkeys(table["pair"]))[: 2 if narrow else MAX_PAIRS]
    columns = len(names) + (not narrow and len(names) > 0)  # the last is for the legends
    figure, axes = style.make_panels(len(PANELS), columns, 7.0 if narrow else 6.6, width=width)
    if not narrow:
        axes[0].get_gridspec().set_width_ratios([1.0] * len(names) + [0.62 - 0.1 * len(names)])
    is_short = narrow or len(names) > 2
    handles: dict[str, Any] = {}
    for i, (key, panel) in enumerate(PANELS.items()):
        row_axes = axes[i * columns : i * columns + len(names)]
        for ax, name in zip(row_axes, names, strict=True):
            rows = table[(table["pair"] == name) & (table["panel"] == key)]
            panel.draw(ax, rows)
            number = panel.measure(rows)
            finding = (panel.short_title if is_short else panel.title).format(number)
            title = [fill(pair_label(name), 16 if is_short else 40)] * (i == 0) + [finding] * bool(
                number
            )
            ax.set_title("\n".join(title))
            ax.set_xlabel(panel.x_label)
        share_axes(row_axes)
        row_axes[0].set_ylabel(panel.y_label)
        labelled = dict(zip(*reversed(row_axes[0].get_legend_handles_labels()), strict=True))
        handles |= labelled
        if not narrow:
            legend_axes = axes[i * columns + len(names)]
            legend_axes.set_axis_off()
            legend_axes.legend(labelled.values(), labelled, loc="center left")
    if narrow:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


def share_axes(row_axes: list[Any]) -> None:
    """Give the panels of a row the same limits, and tick labels on the left only."""
    for name in ("x", "y"):
        limits = np.array([getattr(ax, f"get_{name}lim")() for ax in row_axes])
        for ax in row_axes:
            getattr(ax, f"set_{name}lim")(limits.min(), limits.max())
    for ax in row_axes[1:]:
        ax.tick_params(labelleft=False)


def draw_scatter(axes: Any, rows: pd.DataFrame) -> None:
    """Draw both models' probabilities of sampled tokens."""
    options = {"ms": 3, "color": style.GREY, "alpha": 0.6, "mew": 0, "label": "sampled token"}
    axes.plot(rows["x"], rows["y"].clip(lower=1e-12), ".", **options)
    axes.plot([1e-12, 1], [1e-12, 1], color="black", lw=0.6, label="p = q")
    smallest = max(1e-12, rows["y"].min() / 10) if len(rows) else 1e-6
    axes.set(xscale="log", yscale="log", xlim=(1e-6, 1.6), ylim=(smallest, 4))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=4))
    axes.minorticks_off()


def measure_scatter(rows: pd.DataFrame) -> str:
    """Return the share of the tokens that the teacher finds far less likely than the student."""
    share = (rows["y"] * FAR_RATIO < rows["x"]).mean()
    return f"{100 * share:.0f} %" if len(rows) else ""


def draw_gap(axes: Any, rows: pd.DataFrame) -> None:
    """Draw quantiles and mean of log q - log p by position."""
    for series, color, marker, label in (
        ("quantiles", style.PURPLE, "s", "median, middle 90 %"),
        ("mean", style.GREEN, "o", "mean, 95 % interval"),
    ):
        part = rows[rows["series"] == series].sort_values("x")
        options = {"color": color, "marker": marker, "ms": 3, "label": label}
        style.plot_band(axes, part["x"], part["y"], part["low"], part["high"], **options)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xscale("log", base=2)
    axes.get_xaxis().set_major_locator(LogLocator(base=2, numticks=4))
    axes.get_xaxis().set_major_formatter("{x:g}")


def measure_gap(rows: pd.DataFrame) -> str:
    """Return the range of the mean signal over the positions."""
    mean = rows[rows["series"] == "mean"]["y"]
    ends = [f"{x:.1f}".replace("-0.0", "0.0").replace("-", "−") for x in (mean.min(), mean.max())]
    return f"{ends[0]} to {ends[1]}" if len(mean) else ""


def draw_lorenz(axes: Any, rows: pd.DataFrame) -> None:
    """Draw the share of |r| that the largest tokens have, at the first and the last step."""
    steps = sorted(rows["step"].unique())
    curves: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "first saved batch": (steps[:1], {"color": style.RED, "ls": "--", "zorder": 3}),
        "last saved batch": (steps[1:][-1:], {"color": style.BLUE}),
    }
    for label, (chosen, options) in curves.items():
        part = rows[rows["step"].isin(chosen)].sort_values("x")
        options["label"] = label
        if len(part):
            style.plot_band(axes, part["x"], part["y"], part["low"], part["high"], **options)
    axes.plot(TOKEN_SHARES, TOKEN_SHARES, color=style.GREY, lw=1, label="all tokens equal")
    axes.set(xscale="log", ylim=(0, 1.04), yticks=[0, 0.5, 1])
    axes.set_xticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "all"], fontsize=7)
    axes.minorticks_off()


def measure_lorenz(rows: pd.DataFrame) -> str:
    """Return the share of the largest 1 % of the tokens, at the first and the last step."""
    top = rows[rows["x"] == TOP_SHARE].sort_values("step")["y"]
    return f"{' → '.join(f'{100 * y:.0f}' for y in top)} %" if len(top) else ""


def draw_decomposition(axes: Any, rows: pd.DataFrame) -> None:
    """Draw the stacked parts of the KL by step, and their sum with its interval."""
    totals = rows[rows["series"] == "parts"].sort_values("x")
    heights = [rows[rows["series"] == part].sort_values("x")["y"].clip(lower=0) for part in PARTS]
    labels, colors = zip(*PARTS.values(), strict=True)
    axes.stackplot(totals["x"], heights, labels=labels, colors=colors, lw=0)
    spread = [totals["y"] - totals["low"], totals["high"] - totals["y"]]
    options = {"color": "black", "lw": 0.8, "elinewidth": 0.5, "label": "sum, 95 % interval"}
    axes.errorbar(totals["x"], totals["y"], yerr=spread, **options)
    axes.set_ylim(bottom=0)


def measure_decomposition(rows: pd.DataFrame) -> str:
    """Return the share of the KL beyond the support, over all steps."""
    sums = rows.groupby("series")["y"].sum()
    if not sums.get("parts", 0) > 0:
        return ""
    return f"{100 * sums['tail'] / sums['parts']:.0f} %"


@dataclass(frozen=True)
class Panel:
    """A kind of panel."""

    draw: Callable[[Any, pd.DataFrame], None]
    """Draws the rows of a pair on axes."""
    measure: Callable[[pd.DataFrame], str]
    """Returns the number that the title tells, or nothing without rows."""
    title: str
    short_title: str
    x_label: str
    y_label: str


PANELS = {
    "scatter": Panel(
        draw_scatter,
        measure_scatter,
        f"q < p/{FAR_RATIO} for {{}} of the tokens",
        f"q < p/{FAR_RATIO} in {{}}",
        "student's probability p",
        "teacher's q",
    ),
    "gap": Panel(
        draw_gap,
        measure_gap,
        "mean signal {} nats",
        "mean {}",
        "position (tokens)",
        "log q − log p (nats)",
    ),
    "lorenz": Panel(
        draw_lorenz,
        measure_lorenz,
        "top 1 %: {} of the signal",
        "top 1 %: {}",
        "largest tokens",
        "share of |r|",
    ),
    "anatomy": Panel(
        draw_decomposition,
        measure_decomposition,
        "{} of the KL lies beyond S",
        "{} beyond S",
        "step",
        "reverse KL\n(nats per token)",
    ),
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
