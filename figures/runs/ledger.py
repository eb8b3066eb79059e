"""Breakdown of supervision: which kinds of tokens the energy of the updates comes from."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.stats import bootstrap_interval
from figures import style

COLUMNS = ("method", "runs", "step", "kind", "quantity", "value", "low", "high")
CAPTION = (
    "Share of the energy r² |1_y − p|² of the sampled-token update (top) and of the tokens "
    "(bottom) by kind of token. The kind is the first of these that applies: special token; "
    "repeated (completes an 8-gram that its response already has); excluded (the student is sure, "
    "p > 0.9, and the teacher excludes it, q < 1e-4); uncertain (the student's entropy is in the "
    "top fifth of the run's first batch); any other. Whiskers: 95 % bootstrap intervals over "
    "prompts of each kind's own share. Numbers: N_eff = (Σe)² / Σe², the number of tokens that "
    "would have the same effect if they were equal, in percent of all tokens, with the same "
    "interval. Tokens masked out of the loss are not counted."
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


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw stacked shares by step: one column a method, energy above and tokens below."""
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    figure, axes = style.make_panels(2, len(methods), 4.4, width=width)
    for i, method in enumerate(methods):
        method_rows = table[table["method"] == method]
        for j, quantity in enumerate(("energy", "tokens")):
            ax = axes[i + j * len(methods)]
            draw_stack(ax, method_rows[method_rows["quantity"] == quantity])
            if i == 0:
                ax.set_ylabel(f"share of the {quantity}")
        axes[i].set_title(method)
        axes[i + len(methods)].set_xlabel("step")
        label_effective_share(
            axes[i], method_rows[method_rows["quantity"] == "n_eff_share"].sort_values("step")
        )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def draw_stack(axes: Any, rows: pd.DataFrame) -> None:
    """Draw one stacked bar a step; each kind has its own interval at its top."""
    steps = sorted(rows["step"].unique())
    x, bottom = np.arange(len(steps)), np.zeros(len(steps))
    for i, (kind, (label, colour)) in enumerate(KINDS.items()):
        kind_rows = rows[rows["kind"] == kind].set_index("step").reindex(steps)
        value = kind_rows["value"].fillna(0).to_numpy()
        axes.bar(x, value, 0.8, bottom=bottom, color=colour, label=label)
        if kind != "rest":
            spread = np.stack(
                [value - kind_rows["low"].fillna(0), kind_rows["high"].fillna(0) - value]
            ).clip(0)
            axes.errorbar(
                x - 0.24 + 0.16 * i,
                bottom + value,
                yerr=np.where(value > 0.005, spread, np.nan),
                fmt="none",
                ecolor="#333333",
                lw=0.8,
            )
        bottom = bottom + value
    axes.set(ylim=(0, 1), xticks=x)
    axes.set_xticklabels([f"{step:g}" for step in steps])
    axes.grid(axis="x", visible=False)


def label_effective_share(axes: Any, rows: pd.DataFrame) -> None:
    """Write N_eff in percent of all tokens, with its interval, above each bar."""
    for i, (value, low, high) in enumerate(rows[["value", "low", "high"]].to_numpy() * 100):
        text = f"{value:.2g} %\n{low:.2g}–{high:.2g}"
        axes.text(i, 1.02, text, ha="center", va="bottom", fontsize=5.5)
    axes.title.set_position((0, 1))
    axes.set_title(axes.get_title(loc="left"), pad=22)


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
