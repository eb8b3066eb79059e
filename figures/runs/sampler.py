"""Sampler check: were the tokens sampled from the student that was scored?"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "panel", "label", "order", "step", "value", "variance")
CAPTION = (
    "z of the surprise −log p(y) relative to the student's entropy: about N(0, 1) if tokens are "
    "sampled from the scored student. Left: by position in the response; dots are single steps "
    "and runs, diamonds all of them pooled. Right: by kind of prefix, over the saved batches. "
    "Band: ±3, which contains 99.7 % of the values; where nearly all tokens are certain, a rare "
    "one makes the tails heavier. Nucleus sampling (top-p below 1) leaves the band by design: "
    "likely tokens are overrepresented, z is negative, and the pooled z grows with the root of "
    "the number of tokens. Runs configured with a nucleus have no values by position."
)
BAND = 3.0
KINDS = ("student sure", "student undecided", "first 8 tokens", "inside a repetition", "all")


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw z by position and by kind of prefix; one color a method."""
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = style.make_panels(1, 2, 3.1, width=width)
    for ax, panel in zip(axes, ("position", "kind"), strict=True):
        rows = table[table["panel"] == panel]
        order = rows.sort_values("order").drop_duplicates("label")["label"].tolist()
        ax.axhspan(-BAND, BAND, color=style.GREY, alpha=0.15, lw=0)
        ax.axhline(0, color="black", lw=0.6)
        for i, method in enumerate(methods):
            method_rows = rows[rows["method"] == method]
            draw_points(
                ax, method_rows, order, style.CYCLE[i % 7], 0.7 * (i + 0.5) / len(methods) - 0.35
            )
        ax.set_xticks(range(len(order)), order, rotation=30, ha="right")
        ax.set_yscale("symlog", linthresh=4)
        ticks = [-100, -30, -10, -3, 0, 3, 10, 30, 100]
        low, high = ax.get_ylim()
        ax.set_yticks([t for t in ticks if low <= t <= high])
        ax.get_yaxis().set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.grid(axis="x", visible=False)
    axes[0].set_title("By position")
    axes[0].set_ylabel("z of the surprise")
    axes[1].set_title("By kind of prefix")
    for i, method in enumerate(methods):
        axes[0].plot([], [], "D", ms=4, color=style.CYCLE[i % 7], label=method)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_points(axes: Any, rows: pd.DataFrame, order: list[str], colour: str, shift: float) -> None:
    """Draw single values as dots and the pooled value as a diamond."""
    for x, label in enumerate(order):
        label_rows = rows[rows["label"] == label].dropna(subset=["value"])
        if label_rows.empty:
            continue
        spread = shift + np.linspace(-0.06, 0.06, len(label_rows))
        axes.plot(x + spread, label_rows["value"], ".", ms=2, alpha=0.4, color=colour, mew=0)
        pooled = combine_z(label_rows["value"].to_numpy(), label_rows["variance"].to_numpy())
        axes.plot(x + shift, pooled, "D", ms=4, color=colour, mec="white", mew=0.5, zorder=4)


def combine_z(z: np.ndarray, variance: np.ndarray) -> float:
    """Combine z values: sum z_i sqrt(v_i) / sqrt(sum v_i), with equal v where it is unknown."""
    weight = np.sqrt(np.where(np.isnan(variance), 1.0, variance))
    return float((z * weight).sum() / np.sqrt((weight**2).sum()))


def collect(runs: list[Path]) -> pd.DataFrame:
    """Collect z by position bin at every step, and by kind of prefix at every saved step.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.
    """
    from diagnostics.records.rows import position_bin_values
    from diagnostics.records.run_folder import RunFolder
    from diagnostics.records.run_groups import common_saved_steps, group_by_method
    from diagnostics.stats import round_significant
    from figures.collect.tokens import token_table

    records = []
    for method, method_runs in group_by_method(runs).items():
        labels = {"method": method, "runs": len(method_runs)}
        for run in method_runs:
            for row in RunFolder(run).rows():
                for (low, high), value in position_bin_values(row, "consistency/z_H").items():
                    keys = {"label": f"{low}–{high}", "order": low, "step": row["step"]}
                    records.append(
                        labels | {"panel": "position", **keys, "value": round_significant(value)}
                    )
        for step in common_saved_steps(method_runs):
            for run in method_runs:
                data = token_table([run], step, unsupervised=True)
                for kind, (value, variance) in z_by_kind(data).items():
                    keys = {"label": kind, "order": KINDS.index(kind), "step": step}
                    keys |= {
                        "value": round_significant(value),
                        "variance": round_significant(variance),
                    }
                    records.append(labels | {"panel": "kind", **keys})
    return pd.DataFrame(records, columns=list(COLUMNS))


def z_by_kind(data: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Compute z = sum(-log p(y) - H) / sqrt(sum Var(-log p)) for each kind of prefix.

    A kind must be known before the token is sampled, otherwise the differences would not average to
    0. Whether a prefix is in a repetition is therefore decided from the previous token.

    Args:
        data: A table of tokens, including those masked out of the loss.

    Returns:
        {kind: (z, variance)}.
    """
    entropy = data["student_entropy"]
    variance = (data["surprise_square"] - entropy**2).clip(lower=0)
    previous_repeated = data["repeated"].shift(fill_value=False) & (
        data["response"] == data["response"].shift()
    )
    kinds = dict(
        zip(
            KINDS,
            (
                entropy < 0.1,
                entropy >= 0.1,
                data["position"] < 8,
                previous_repeated,
                pd.Series(True, index=data.index),
            ),
            strict=True,
        )
    )
    results = {}
    for kind, selected in kinds.items():
        spread = variance[selected].sum()
        if spread > 0:
            difference = (-data["student_logp"] - entropy)[selected].sum()
            results[kind] = float(difference / spread**0.5), float(spread)
    return results
