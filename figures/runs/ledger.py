"""Breakdown of supervision: which kinds of tokens the energy of the updates comes from."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.stats import bootstrap_interval
from figures import style
from figures.labels import method_label

COLUMNS = ("method", "runs", "step", "kind", "quantity", "value", "low", "high")
CAPTION = (
    "Which kinds of tokens the update comes from. Energy: share of r² |1_y − p|², the squared "
    "size of the sampled-token update, where r = log p(y) − log q(y); tokens: share of the "
    "tokens. Numbers: shares of 10 % or more. The kind is the first of these that applies: "
    "special token; repeated (completes an 8-gram that its response already has); excluded (the "
    "student is sure, p > 0.9, and the teacher excludes it, q < 1e-4); uncertain (the student's "
    "entropy is in the top fifth of the run's first batch); any other. Effective tokens: N_eff = "
    "(Σe)² / Σe², the number of tokens that would have the same effect if their energies e were "
    "equal, in percent of all tokens. Whiskers: 95 % bootstrap intervals over prompts, in the "
    "bars of each kind's own share where it is 2 % or more. Tokens masked out of the loss are not "
    "counted."
)
KINDS = {
    "special": ("special token", style.PURPLE),
    "repeated": ("repeated 8-gram", style.ORANGE),
    "excluded": ("student sure, teacher excludes", style.RED),
    "uncertain": ("student uncertain", style.SKY),
    "rest": ("any other", "#BDBDBD"),
}
MAX_METHODS = 4
"""Methods in one figure."""
TITLES = ("energy, %", "tokens, %", "effective\ntokens, %")
MIN_WHISKER, MIN_LABEL = 0.02, 0.1
"""Smallest shares with a whisker and with a number."""
WHISKER = "#333333"


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw shares of energy and of tokens, and effective tokens, by step and method.

    Across a page a column is a method; in one column a row is.
    """
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    if style.is_column(width):
        height = 0.9 + 1.15 * len(methods)
        figure, axes = style.make_panels(len(methods), len(TITLES), height, width=width)
        panels = [axes[len(TITLES) * i : len(TITLES) * (i + 1)] for i in range(len(methods))]
    else:
        figure, axes = style.make_panels(len(TITLES), len(methods), 5.6, width=width)
        panels = [axes[i :: len(methods)] for i in range(len(methods))]
    for method, method_panels in zip(methods, panels, strict=True):
        draw_method(method_panels, table[table["method"] == method])
    share_axes(panels)
    label_panels(panels, methods, width)
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=WHISKER, lw=0.8, marker="|", ms=0))
    labels.append("95 % interval")
    columns = 2 if style.is_column(width) else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def draw_method(panels: list[Any], rows: pd.DataFrame) -> None:
    """Draw the shares of energy and tokens, and the effective tokens, of one method."""
    for axes, quantity in zip(panels[:2], ("energy", "tokens"), strict=True):
        draw_stack(axes, rows[rows["quantity"] == quantity])
    draw_effective_share(panels[2], rows[rows["quantity"] == "n_eff_share"].sort_values("step"))


def share_axes(panels: list[list[Any]]) -> None:
    """Give the effective tokens of all methods the same axis."""
    for method_panels in panels[1:]:
        method_panels[2].sharey(panels[0][2])
    style.set_log_axis(panels[0][2])
    low, high = panels[0][2].get_ylim()
    panels[0][2].set_ylim(low / 1.5, high * 1.5)
    panels[0][2].yaxis.set_major_formatter("{x:g}")


def label_panels(panels: list[list[Any]], methods: list[str], width: float) -> None:
    """Name methods and quantities at the outer panels."""
    for i, (method, method_panels) in enumerate(zip(methods, panels, strict=True)):
        label = textwrap.fill(method_label(method), 18, break_on_hyphens=False)
        if style.is_column(width):
            method_panels[0].set_ylabel(label)
            for axes, title in zip(method_panels, TITLES, strict=True):
                axes.set_title(title if i == 0 else "")
                axes.set_xlabel("step" if i + 1 == len(methods) else "")
            method_panels[1].tick_params(labelleft=False)
        else:
            method_panels[0].set_title(label)
            method_panels[-1].set_xlabel("step")
            for axes, title in zip(method_panels, TITLES, strict=True):
                axes.set_ylabel(title if i == 0 else "")
                axes.tick_params(labelleft=i == 0)


def draw_stack(axes: Any, rows: pd.DataFrame) -> None:
    """Draw one stacked bar a step; each kind has its own interval at its top."""
    steps = sorted(rows["step"].unique())
    x, bottom = np.arange(len(steps)), np.zeros(len(steps))
    for kind, (label, colour) in KINDS.items():
        kind_rows = rows[rows["kind"] == kind].set_index("step").reindex(steps)
        value = kind_rows["value"].fillna(0).to_numpy()
        axes.bar(x, value, 0.9, bottom=bottom, color=colour, label=label)
        ends = kind_rows[["low", "high"]].fillna(0).to_numpy().T
        spread = np.abs(ends - value).clip(max=np.stack([value, np.maximum(1 - bottom - value, 0)]))
        shown = (value >= MIN_WHISKER) & (kind != "rest")
        options: dict[str, Any] = {"fmt": "none", "ecolor": WHISKER, "lw": 0.8}
        whiskers = np.where(shown, spread, np.nan)
        axes.errorbar(x + 0.38, bottom + value, yerr=whiskers, **options)
        for i in np.flatnonzero(value >= MIN_LABEL):
            text = f"{100 * value[i]:.0f}"
            middle = bottom[i] + value[i] / 2
            axes.text(x[i] - 0.08, middle, text, ha="center", va="center", fontsize=7)
        bottom = bottom + value
    axes.set(ylim=(0, 1), xticks=x)
    axes.set_yticks((0, 0.5, 1), ("0", "50", "100"))
    axes.set_xticklabels([f"{step:g}" for step in steps])
    axes.grid(axis="x", visible=False)


def draw_effective_share(axes: Any, rows: pd.DataFrame) -> None:
    """Draw N_eff in percent of all tokens, with its interval, at each step."""
    value, low, high = rows[["value", "low", "high"]].to_numpy().T * 100
    x = np.arange(len(rows))
    options: dict[str, Any] = {"fmt": "o", "ms": 3.5, "lw": 0.8, "color": WHISKER}
    axes.errorbar(x, value, yerr=[value - low, high - value], **options)
    axes.set_xticks(x, [f"{step:g}" for step in rows["step"]])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.grid(axis="x", visible=False)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Compute shares of energy and tokens by kind at every step that all runs of a method saved.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.
    """
    from diagnostics.records.run_groups import common_saved_steps, group_by_method
    from diagnostics.records.vocabulary import load_run_vocabulary
    from figures.collect.tokens import shares_by_kind, token_table

    rows, generator = [], np.random.default_rng(0)
    for method, method_runs in group_by_method(runs).items():
        special = load_run_vocabulary(method_runs[0]).special
        uncertain = None
        for step in common_saved_steps(method_runs):
            data = token_table(method_runs, step)
            if uncertain is None:
                uncertain = float(data["student_entropy"].quantile(0.8))
            kinds = classify_tokens(data, special, uncertain)
            labels = {"method": method, "runs": len(method_runs), "step": step}
            unit_weight = pd.Series(1.0, index=data.index)
            for quantity, weight in (("energy", data["energy"]), ("tokens", unit_weight)):
                for kind, interval in shares_by_kind(data, kinds, weight, generator).items():
                    rows.append(labels | make_row(kind, quantity, interval))
            rows.append(labels | make_row("", "n_eff_share", effective_share(data, generator)))
    return pd.DataFrame(rows)


def make_row(kind: str, quantity: str, band: tuple[float, float, float]) -> dict[str, Any]:
    """Return a row of the table with rounded values."""
    from diagnostics.stats import round_significant

    value, low, high = map(round_significant, band)
    return {"kind": kind, "quantity": quantity, "value": value, "low": low, "high": high}


def effective_share(
    data: pd.DataFrame, generator: np.random.Generator
) -> tuple[float, float, float]:
    """Compute (sum e)^2 / (N sum e^2) of the tokens' energies e.

    Args:
        data: A table of tokens.
        generator: Random generator of the bootstrap.

    Returns:
        (value, low, high), with a 95 % bootstrap interval over clusters.
    """
    sums = pd.DataFrame({"one": 1.0, "e": data["energy"], "ee": data["energy"] ** 2})
    values = sums.groupby(data["cluster"]).sum().to_numpy()

    def share(x: np.ndarray) -> np.ndarray:
        count, total, square = x.sum(0)
        return total**2 / square / count

    low, high = bootstrap_interval(values, share, generator, resamples=1000)
    return float(share(values)), float(low), float(high)


def classify_tokens(data: pd.DataFrame, special: frozenset[int], uncertain: float) -> pd.Series:
    """Return the kind of every token: the first of KINDS that applies."""
    kinds = pd.Series("rest", index=data.index)
    kinds[data["student_entropy"] > uncertain] = "uncertain"
    kinds[data["impossible"]] = "excluded"
    kinds[data["repeated"]] = "repeated"
    kinds[data["id"].isin(special)] = "special"
    return kinds
