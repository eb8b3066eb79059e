"""Two pairs of models side by side: one made for the task, and one that was pretrained on text."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.runs.lorenz import GRID

COLUMNS = ("pair", "panel", "series", "step", "x", "y", "low", "high")
CAPTION = (
    "The same instruments on two pairs. lab: a byte-level student and a teacher with habits of its "
    "own, made for a synthetic task. smollm: 24 of the 30 layers of SmolLM2-135M-Instruct, healed "
    "for 40 steps, and the whole model, on sums asked in words. Both are trained with the "
    "renormalised teacher top-K. From the left: both models' probabilities of sampled tokens "
    "at the first step (a sample of 800); signal log q − log p by position at the first step "
    "(median, middle 90 %, and the mean with its 95 % interval over prompts); share of the signal "
    "that the largest tokens hold, first step dashed, last solid, with 95 % intervals; the "
    "divergence by step, with its parts. The first pair's signal sits in a few tokens, the tag and "
    "the end that the teacher writes in another way; the second's is spread over many. There 16 of "
    "49 152 ids leave about half of the divergence beyond them, unseen by the loss, and the "
    "student's mass leaves the support while it trains."
)
PARTS = {
    "binary": ("in or out of S", style.RED),
    "head": ("within S", style.BLUE),
    "tail": ("beyond S", style.ORANGE),
}
SCATTERED, MOST = 800, 3


def draw(table: pd.DataFrame) -> Figure:
    """A row a pair, four instruments each."""
    names = list(dict.fromkeys(table["pair"]))[:MOST]
    figure, axes = style.panels(len(names), 4, 0.6 + 1.9 * len(names))
    for i, name in enumerate(names):
        mine, last = table[table["pair"] == name], i + 1 == len(names)
        here = axes[4 * i : 4 * i + 4]
        for place, (panel, (draw_panel, title, label)) in zip(here, PANELS.items(), strict=True):
            draw_panel(place, mine[mine["panel"] == panel])
            place.set(title=title if i == 0 else "", xlabel=label if last else "")
        here[0].set_ylabel(f"{name}\nteacher's probability")
        here[1].set_ylabel("log q − log p")
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return figure


def scatter(axes: Any, rows: pd.DataFrame) -> None:
    axes.plot(rows["x"], rows["y"].clip(lower=1e-12), ".", ms=2, color=style.BLUE, alpha=0.4, mew=0)
    axes.plot([1e-12, 1], [1e-12, 1], color="black", lw=0.6)
    axes.set(xscale="log", yscale="log", xlim=(1e-6, 1.6), ylim=(1e-12, 4))


def gap(axes: Any, rows: pd.DataFrame) -> None:
    for series, colour in (("quantiles", style.BLUE), ("mean", style.RED)):
        at = rows[rows["series"] == series].sort_values("x")
        how = {"color": colour, "marker": "o", "ms": 2.5, "label": series}
        style.curve(axes, at["x"], at["y"], at["low"], at["high"], **how)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xscale("log", base=2)
    axes.get_xaxis().set_major_formatter("{x:g}")


def lorenz(axes: Any, rows: pd.DataFrame) -> None:
    steps = sorted(rows["step"].unique())
    for step, dash in zip((steps[0], steps[-1]), ("--", "-"), strict=True):
        at = rows[rows["step"] == step].sort_values("x")
        style.curve(axes, at["x"], at["y"], at["low"], at["high"], color=style.BLUE, ls=dash)
    axes.plot(GRID, GRID, color=style.GREY, lw=1)
    axes.axvline(0.01, color="black", lw=0.6, ls=":")
    axes.set(xscale="log", ylim=(0, 1.01))
    axes.set_xticks([0.001, 0.01, 0.1, 1], [".1 %", "1 %", "10 %", "all"])


def anatomy(axes: Any, rows: pd.DataFrame) -> None:
    whole = rows[rows["series"] == "parts"].sort_values("x")
    heights = [rows[rows["series"] == part].sort_values("x")["y"].clip(lower=0) for part in PARTS]
    labels, colours = zip(*PARTS.values(), strict=True)
    axes.stackplot(whole["x"], heights, labels=labels, colors=colours, lw=0)
    style.curve(axes, whole["x"], whole["y"], whole["low"], whole["high"], color="black", lw=0.8)
    axes.set_ylim(bottom=0)


PANELS: dict[str, tuple[Any, str, str]] = {
    "scatter": (scatter, "Sampled tokens", "student's probability"),
    "gap": (gap, "Signal, nats", "position"),
    "lorenz": (lorenz, "Share of |r| held", "largest tokens"),
    "anatomy": (anatomy, "KL, nats a token", "step"),
}


def collect(runs: list[Path]) -> pd.DataFrame:
    """All panels of each run; a pair is named after its run folder."""
    from diagnostics.records.run_folders import methods, saved, short
    from figures.collect.tokens import tokens
    from figures.runs import anatomy as parts
    from figures.runs.lorenz import curve

    frames, generator = [], np.random.default_rng(0)
    for name, mine in methods(runs).items():
        steps = saved(mine)
        data = {step: tokens(mine, step) for step in sorted({steps[0], steps[-1]})}
        records = sampled(data[steps[0]], generator) + by_position(data[steps[0]], generator)
        for step, some in data.items():
            x, cluster = some["cost"].abs().to_numpy(float), some["cluster"].to_numpy()
            for share, *band in zip(GRID, *curve(x, cluster, generator), strict=True):
                y, low, high = map(short, band)
                about = {"panel": "lorenz", "series": "signal", "step": step, "x": share}
                records.append(about | {"y": y, "low": low, "high": high})
        whole = parts.collect(mine)
        whole = whole[whole["first"].isna()]
        for row in whole.itertuples():
            about = {"panel": "anatomy", "series": row.part, "step": row.step, "x": row.step}
            y, low, high = (short(row.value + z * row.error) for z in (0, -1.96, 1.96))
            records.append(about | {"y": y, "low": low, "high": high})
        frames.append(pd.DataFrame(records).assign(pair=name))
    return pd.concat(frames, ignore_index=True)[list(COLUMNS)]


def sampled(data: pd.DataFrame, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Both models' probabilities of SCATTERED tokens, drawn without replacement."""
    chosen = data.iloc[generator.permutation(len(data))[:SCATTERED]]
    p, q = np.exp(chosen["student_logp"]), np.exp(chosen["teacher_logp"].astype(float))
    about = {"panel": "scatter", "series": "token", "step": 0}
    return [
        about | {"x": float(f"{a:.3g}"), "y": float(f"{b:.3g}")} for a, b in zip(p, q, strict=True)
    ]


def by_position(data: pd.DataFrame, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Median and middle 90 % of log q - log p by position bin; its mean with an interval."""
    from diagnostics.records.run_folders import short
    from diagnostics.stats import bootstrap_interval

    records = []
    number = np.floor(np.log2(data["position"].clip(lower=1))).astype(int)
    for bin_number, some in data.groupby(number):
        first = 2**bin_number if bin_number else 0
        x = float(np.sqrt((first + 1) * 2 ** (bin_number + 1)))
        signal = -some["cost"].astype(float)
        sums = signal.groupby(some["cluster"]).agg(["sum", "size"]).to_numpy(float)
        if len(some) < 16 or len(sums) < 2:
            continue
        mean = lambda x: x[:, 0].sum() / x[:, 1].sum()  # noqa: E731
        low, high = bootstrap_interval(sums, mean, generator, resamples=1000)
        bands = {"quantiles": signal.quantile([0.5, 0.05, 0.95]), "mean": (mean(sums), low, high)}
        for series, band in bands.items():
            y, a, b = (short(float(v)) for v in band)
            about = {"panel": "gap", "series": series, "step": 0, "x": short(x)}
            records.append(about | {"y": y, "low": a, "high": b})
    return records
