"""The sampler check: were the tokens drawn from the student that was scored?"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("method", "runs", "panel", "label", "order", "step", "value", "variance")
CAPTION = (
    "z of the surprise −log p(y) against the student's entropy, about N(0, 1) wherever tokens are "
    "drawn from the scored student. Left: by position in the response; dots are single steps and "
    "runs, diamonds all of them together. Right: by kind of prefix, over the saved batches. Band: "
    "±3, within which 99.7 % of them belong; where nearly all tokens are certain, a rare one makes "
    "the tails heavier. A nucleus (top-p below 1) leaves the band on purpose: likely tokens are "
    "overrepresented, z is negative, and together it grows with the root of the tokens. Runs that "
    "declare one have no reading by position."
)
BAND = 3.0
KINDS = ("student sure", "student undecided", "first 8 tokens", "inside a repetition", "all")


def draw(table: pd.DataFrame) -> Figure:
    """Two panels; a colour a method."""
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = style.panels(1, 2, 3.1)
    for place, panel in zip(axes, ("position", "kind"), strict=True):
        rows = table[table["panel"] == panel]
        order = rows.sort_values("order").drop_duplicates("label")["label"].tolist()
        place.axhspan(-BAND, BAND, color=style.GREY, alpha=0.15, lw=0)
        place.axhline(0, color="black", lw=0.6)
        for i, method in enumerate(methods):
            mine = rows[rows["method"] == method]
            points(place, mine, order, style.CYCLE[i % 7], 0.7 * (i + 0.5) / len(methods) - 0.35)
        place.set_xticks(range(len(order)), order, rotation=30, ha="right")
        place.set_yscale("symlog", linthresh=4)
        ticks = [-100, -30, -10, -3, 0, 3, 10, 30, 100]
        low, high = place.get_ylim()
        place.set_yticks([t for t in ticks if low <= t <= high])
        place.get_yaxis().set_major_formatter("{x:g}")
        place.minorticks_off()
        place.grid(axis="x", visible=False)
    axes[0].set_title("By position")
    axes[0].set_ylabel("z of the surprise")
    axes[1].set_title("By kind of prefix")
    for i, method in enumerate(methods):
        axes[0].plot([], [], "D", ms=4, color=style.CYCLE[i % 7], label=method)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def points(axes: Any, rows: pd.DataFrame, order: list[str], colour: str, shift: float) -> None:
    """Single readings as dots, all of them together as a diamond."""
    for x, label in enumerate(order):
        at = rows[rows["label"] == label].dropna(subset=["value"])
        if at.empty:
            continue
        spread = shift + np.linspace(-0.06, 0.06, len(at))
        axes.plot(x + spread, at["value"], ".", ms=2, alpha=0.4, color=colour, mew=0)
        together = joined(at["value"].to_numpy(), at["variance"].to_numpy())
        axes.plot(x + shift, together, "D", ms=4, color=colour, mec="white", mew=0.5, zorder=4)


def joined(z: np.ndarray, variance: np.ndarray) -> float:
    """One z of several: sum z_i sqrt(v_i) / sqrt(sum v_i); with equal v where it is not known."""
    weight = np.sqrt(np.where(np.isnan(variance), 1.0, variance))
    return float((z * weight).sum() / np.sqrt((weight**2).sum()))


def collect(runs: list[Path]) -> pd.DataFrame:
    """z by position bin at every step of every run, and by kind of prefix at every saved step."""
    from diagnostics.records.run_folders import bins, methods, recorded_rows, saved, short
    from figures.collect.tokens import tokens

    records = []
    for method, mine in methods(runs).items():
        about = {"method": method, "runs": len(mine)}
        for run in mine:
            for row in recorded_rows(run):
                for (low, high), value in bins(row, "consistency/z_H").items():
                    here = {"label": f"{low}–{high}", "order": low, "step": row["step"]}
                    records.append(about | {"panel": "position", **here, "value": short(value)})
        for step in saved(mine):
            for run in mine:
                data = tokens([run], step, unsupervised=True)
                for kind, (value, variance) in by_kind(data).items():
                    here = {"label": kind, "order": KINDS.index(kind), "step": step}
                    here |= {"value": short(value), "variance": short(variance)}
                    records.append(about | {"panel": "kind", **here})
    return pd.DataFrame(records, columns=list(COLUMNS))


def by_kind(data: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """z = sum (−log p(y) − H) / sqrt(sum Var(−log p)) over each kind of prefix, and that variance.

    Kinds are known before the token is drawn, or the differences would not average to 0: whether a
    prefix is in a repetition is told from the token before.
    """
    entropy = data["student_entropy"]
    variance = (data["surprise_square"] - entropy**2).clip(lower=0)
    before = data["repeated"].shift(fill_value=False) & (
        data["response"] == data["response"].shift()
    )
    kinds = dict(
        zip(
            KINDS,
            (
                entropy < 0.1,
                entropy >= 0.1,
                data["position"] < 8,
                before,
                pd.Series(True, index=data.index),
            ),
            strict=True,
        )
    )
    found = {}
    for kind, chosen in kinds.items():
        spread = variance[chosen].sum()
        if spread > 0:
            difference = (-data["student_logp"] - entropy)[chosen].sum()
            found[kind] = float(difference / spread**0.5), float(spread)
    return found
