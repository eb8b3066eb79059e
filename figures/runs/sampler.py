"""Sampler check: were the tokens sampled from the student that was scored?"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from figures import style
from figures.labels import method_label

COLUMNS = ("method", "runs", "panel", "label", "order", "step", "value", "variance")
CAPTION = (
    "Were the tokens sampled from the student that was scored? z of the surprise −log p(y) "
    "relative to the student's entropy: about N(0, 1) if they were. By position in the response "
    "(bins double in width), and by kind of prefix over the saved batches (student sure: entropy "
    "below 0.1 nats). Dots: single steps and runs; diamonds: all of them pooled. Band: ±3, which "
    "contains 99.7 % of the values; where nearly all tokens are certain, a rare one makes the "
    "tails heavier. Nucleus sampling (top-p below 1) leaves the band by design: likely tokens are "
    "overrepresented, z is negative, and the pooled z grows with the root of the number of tokens. "
    "Runs configured with a nucleus have no values by position. The vertical axis is linear within "
    "±4 and logarithmic beyond."
)
BAND = 3.0
KINDS = ("student sure", "student undecided", "first 8 tokens", "inside a repetition", "all")
PANELS = {"position": "By position", "kind": "By kind of prefix"}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw z by position and by kind of prefix; one color a method."""
    narrow = style.is_column(width)
    methods = list(dict.fromkeys(table["method"]))
    shape, height = ((2, 1), 5.2) if narrow else ((1, 2), 3.2)
    figure, axes = style.make_panels(*shape, height, width=width)
    for ax, (panel, title) in zip(axes, PANELS.items(), strict=True):
        rows = table[table["panel"] == panel]
        draw_panel(ax, rows, methods)
        ax.set_title(f"{title}:\n{describe_outliers(rows)}")
        ax.set_ylabel("z of the surprise")
    limits = np.array([ax.get_ylim() for ax in axes])
    for ax in axes:
        set_z_axis(ax, limits.min(), limits.max())
    axes[0].set_xlabel("first position of the bin (tokens)")
    axes[1].set_xlabel("kind of prefix")
    add_legend(figure, axes[0], methods, narrow)
    return figure


def draw_panel(axes: Any, rows: pd.DataFrame, methods: list[str]) -> None:
    """Draw the band, and the values of all methods beside each other at each label."""
    order = rows.sort_values("order").drop_duplicates("label")["label"].tolist()
    axes.axhspan(-BAND, BAND, color=style.GREY, alpha=0.15, lw=0)
    axes.axhline(0, color="black", lw=0.6)
    for i, method in enumerate(methods):
        shift = 0.8 * (i + 0.5) / len(methods) - 0.4
        draw_points(axes, rows[rows["method"] == method], order, style.CYCLE[i % 7], shift)
    step = max(1, -(-len(order) // 8))
    names = [label.split("–")[0].replace(" ", "\n", 1) for label in order[::step]]
    axes.set_xticks(range(0, len(order), step), names, fontsize=7)
    axes.set_xlim(-0.6, max(1, len(order)) - 0.4)
    axes.grid(axis="x", visible=False)


def draw_points(axes: Any, rows: pd.DataFrame, order: list[str], colour: str, shift: float) -> None:
    """Draw single values as dots and the pooled value as a diamond."""
    for x, label in enumerate(order):
        label_rows = rows[rows["label"] == label].dropna(subset=["value"])
        if label_rows.empty:
            continue
        spread = shift + np.linspace(-0.06, 0.06, len(label_rows))
        axes.plot(x + spread, label_rows["value"], ".", ms=2.5, alpha=0.45, color=colour, mew=0)
        axes.plot(
            x + shift, pooled_z(label_rows), "D", ms=4, color=colour, mec="black", mew=0.4, zorder=4
        )


def pooled_z(rows: pd.DataFrame) -> float:
    """Combine the z values of all rows."""
    return combine_z(rows["value"].to_numpy(), rows["variance"].to_numpy())


def describe_outliers(rows: pd.DataFrame) -> str:
    """Name the methods with a pooled z outside the band."""
    groups = rows.dropna(subset=["value"]).groupby(["method", "label"], sort=False)
    outside = [method for (method, _), group in groups if abs(pooled_z(group)) > BAND]
    names = list(dict.fromkeys(outside))
    if len(names) > 1:
        return f"{len(names)} methods leave ±{BAND:g}"
    if names:
        return f"{method_label(names[0])} leaves ±{BAND:g}"
    return f"every pooled z is within ±{BAND:g}" if len(rows) else "no values"


def set_z_axis(axes: Any, low: float, high: float) -> None:
    """Make the vertical axis linear within ±4 and logarithmic beyond, with rounded ticks."""
    axes.set_yscale("symlog", linthresh=4)
    axes.set_ylim(low * 1.4, high * 1.4)
    ticks = [-300, -100, -30, -10, -3, 0, 3, 10, 30, 100, 300]
    axes.set_yticks([t for t in ticks if low <= t <= high])
    axes.get_yaxis().set_major_formatter("{x:g}")
    axes.minorticks_off()


def add_legend(figure: Figure, axes: Any, methods: list[str], narrow: bool) -> None:
    """Explain colors, marks and the band below the panels."""
    style_of_pool = {"marker": "D", "ls": "", "ms": 4, "mec": "black", "mew": 0.4}
    handles = [
        axes.plot([], [], color=style.CYCLE[i % 7], label=method_label(method), **style_of_pool)[0]
        for i, method in enumerate(methods)
    ]
    handles += [
        axes.plot([], [], color="white", label="all steps and runs pooled", **style_of_pool)[0],
        axes.plot([], [], ".", ms=4, color="black", mew=0, label="one step of a run")[0],
        Patch(color=style.GREY, alpha=0.15, label="±3: expected (99.7 %)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if narrow else 4)


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

    Raises:
        InvalidInput: The runs saved no token that their student had just sampled.
    """
    from diagnostics.errors import InvalidInput
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
                data = token_table([run], step, sampled_now=True)
                for kind, (value, variance) in z_by_kind(data).items():
                    keys = {"label": kind, "order": KINDS.index(kind), "step": step}
                    keys |= {
                        "value": round_significant(value),
                        "variance": round_significant(variance),
                    }
                    records.append(labels | {"panel": "kind", **keys})
    if not records:
        raise InvalidInput(
            f"the students of {', '.join(map(str, runs))} sampled none of the responses that were "
            "saved (prefixes dataset or teacher, or replay); give runs whose students did"
        )
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
