"""The supervision ledger: which kinds of tokens the energy of the updates is spent on."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.stats import bootstrap_interval
from figures import style

COLUMNS = ("method", "runs", "step", "kind", "quantity", "value", "low", "high")
CAPTION = (
    "Where the energy r² |1_y − p|² of the sampled-token update sits (above), beside the share of "
    "the tokens (below), by the first of these that a token is: special; closing an 8-gram that "
    "its response already holds; one of which the student is sure (p > 0.9) and which the teacher "
    "excludes (q < 1e-4); as uncertain (student's entropy) as the top fifth of the run's first "
    "batch; any other. Whiskers: 95 % bootstrap over prompts of the class's own share. Numbers: "
    "N_eff = (Σe)² / Σe², the tokens that would do the same if they were alike, in percent of all, "
    "with the same interval. Tokens that a mask takes out are not counted."
)
KINDS = {
    "special": ("special token", style.PURPLE),
    "repeated": ("repeated 8-gram", style.ORANGE),
    "excluded": ("student sure, teacher excludes", style.RED),
    "uncertain": ("student uncertain", style.SKY),
    "rest": ("any other", "#BDBDBD"),
}
MOST = 4
"""Methods in one picture."""


def draw(table: pd.DataFrame) -> Figure:
    """Stacked shares by step; a column a method, energy above and tokens below."""
    methods = list(dict.fromkeys(table["method"]))[:MOST]
    figure, axes = style.panels(2, len(methods), 4.4)
    for i, method in enumerate(methods):
        mine = table[table["method"] == method]
        for j, quantity in enumerate(("energy", "tokens")):
            place = axes[i + j * len(methods)]
            stack(place, mine[mine["quantity"] == quantity])
            if i == 0:
                place.set_ylabel(f"share of the {quantity}")
        axes[i].set_title(method)
        axes[i + len(methods)].set_xlabel("step")
        effective(axes[i], mine[mine["quantity"] == "n_eff_share"].sort_values("step"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def stack(axes: Any, rows: pd.DataFrame) -> None:
    """One bar a step, the kinds on top of one another, each with its own interval at its top."""
    steps = sorted(rows["step"].unique())
    place, below = np.arange(len(steps)), np.zeros(len(steps))
    for i, (kind, (label, colour)) in enumerate(KINDS.items()):
        at = rows[rows["kind"] == kind].set_index("step").reindex(steps)
        value = at["value"].fillna(0).to_numpy()
        axes.bar(place, value, 0.8, bottom=below, color=colour, label=label)
        if kind != "rest":
            spread = np.stack([value - at["low"].fillna(0), at["high"].fillna(0) - value]).clip(0)
            axes.errorbar(
                place - 0.24 + 0.16 * i,
                below + value,
                yerr=np.where(value > 0.005, spread, np.nan),
                fmt="none",
                ecolor="#333333",
                lw=0.8,
            )
        below = below + value
    axes.set(ylim=(0, 1), xticks=place)
    axes.set_xticklabels([f"{step:g}" for step in steps])
    axes.grid(axis="x", visible=False)


def effective(axes: Any, rows: pd.DataFrame) -> None:
    """N_eff in percent of all tokens, with its interval, above each bar."""
    for i, (value, low, high) in enumerate(rows[["value", "low", "high"]].to_numpy() * 100):
        text = f"{value:.2g} %\n{low:.2g}–{high:.2g}"
        axes.text(i, 1.02, text, ha="center", va="bottom", fontsize=5.5)
    axes.title.set_position((0, 1))
    axes.set_title(axes.get_title(loc="left"), pad=22)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Shares of energy and tokens by kind at every step that all runs of a method saved."""
    from diagnostics.records.run_folders import methods, saved
    from diagnostics.records.vocabulary import read
    from figures.collect.tokens import shares, tokens

    rows, generator = [], np.random.default_rng(0)
    for method, mine in methods(runs).items():
        special = read(mine[0]).special
        uncertain = None
        for step in saved(mine):
            data = tokens(mine, step)
            if uncertain is None:
                uncertain = float(data["student_entropy"].quantile(0.8))
            kinds = classes(data, special, uncertain)
            about = {"method": method, "runs": len(mine), "step": step}
            one = pd.Series(1.0, index=data.index)
            for quantity, weight in (("energy", data["energy"]), ("tokens", one)):
                for kind, found in shares(data, kinds, weight, generator).items():
                    rows.append(about | entry(kind, quantity, found))
            rows.append(about | entry("", "n_eff_share", equal(data, generator)))
    return pd.DataFrame(rows)


def entry(kind: str, quantity: str, band: tuple[float, float, float]) -> dict[str, Any]:
    from diagnostics.records.run_folders import short

    value, low, high = map(short, band)
    return {"kind": kind, "quantity": quantity, "value": value, "low": low, "high": high}


def equal(data: pd.DataFrame, generator: np.random.Generator) -> tuple[float, float, float]:
    """(sum e)^2 / (N sum e^2) of the tokens' energies, with a 95 % bootstrap over clusters."""
    sums = pd.DataFrame({"one": 1.0, "e": data["energy"], "ee": data["energy"] ** 2})
    values = sums.groupby(data["cluster"]).sum().to_numpy()

    def share(x: np.ndarray) -> np.ndarray:
        count, total, square = x.sum(0)
        return total**2 / square / count

    low, high = bootstrap_interval(values, share, generator, resamples=1000)
    return float(share(values)), float(low), float(high)


def classes(data: pd.DataFrame, special: frozenset[int], uncertain: float) -> pd.Series:
    """The kind of every token: the first of KINDS that it is."""
    found = pd.Series("rest", index=data.index)
    found[data["student_entropy"] > uncertain] = "uncertain"
    found[data["impossible"]] = "excluded"
    found[data["repeated"]] = "repeated"
    found[data["id"].isin(special)] = "special"
    return found
