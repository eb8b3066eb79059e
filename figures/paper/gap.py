"""The gap log q - log p by position at the first and the last step (the paper's figure 4)."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from figures import style
from figures.labels import method_label

COLUMNS = ("method", "step", "first", "last", "tokens", "quantile", "value", "low", "high")
CAPTION = (
    "log q - log p of the sampled tokens (in nats; below 0 the teacher gives the token less "
    "probability than the student) by position in the response, bins of 16 positions, at the "
    "first and the last saved step. Dark: 5 to 95 % of the tokens; light: 1 to 99 %; black: "
    "median; red: the 1 % quantile with its 95 % interval (bootstrap over prompts). Titles: the 1 "
    "% quantile in the second and in the last bin. The axis is linear between -0.01 and 0.01 and "
    "logarithmic outside. Think tags and EOS are excluded. These models are sure of most tokens, "
    "so the paper's boxes of the middle half would be flat. The paper has positions up to 16k, at "
    "step 80 of sampled-token training, and no intervals; its claim is that the lower tail widens "
    "with the position."
)
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
BIN_WIDTH, MIN_TOKENS = 16, 200
MAX_METHODS = 4
"""Methods in one figure."""
LIGHT = "#CDE6F5"


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: its first saved step on the left and its last on the right."""
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    narrow = style.is_column(width)
    height = 0.9 + 1.75 * len(methods)
    figure, axes = style.make_panels(len(methods), 2, height, width=width)
    low, high = 1.5 * min(table["low"].min(), -1), 1.5 * max(table["value"].max(), 1)
    for i, method in enumerate(methods):
        method_rows = table[table["method"] == method]
        steps = sorted(method_rows["step"].unique())
        for ax, step in zip(axes[2 * i : 2 * i + 2], (steps[0], steps[-1]), strict=True):
            step_rows = method_rows[method_rows["step"] == step]
            draw_boxes(ax, step_rows)
            ax.set_title(panel_title(step_rows, narrow), fontsize=7 if narrow else 8)
            ax.set_yscale("symlog", linthresh=0.01)
            ax.set(ylim=(low, high), yticks=[-10, -1, -0.1, -0.01, 0.01, 0.1, 1])
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
            ax.set_xlim(0, table["last"].max() + 1)
        axes[2 * i].set_ylabel("log q − log p, nats")
        axes[2 * i + 1].tick_params(labelleft=False)
    for ax in axes[-2:]:
        ax.set_xlabel("position" if narrow else "position in the response")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if narrow else 4)
    return figure


def panel_title(rows: pd.DataFrame, narrow: bool) -> str:
    """Return method, step, and the 1 % quantile in the second bin, after the tag, and the last."""
    name, step = method_label(rows["method"].iloc[0]), rows["step"].iloc[0]
    tail = rows[rows["quantile"] == QUANTILES[0]].sort_values("first")["value"].tolist()
    change = f"{tail[1]:.2g} to {tail[-1]:.2g}".replace("-", "−") if len(tail) > 2 else ""
    if narrow:
        return f"{textwrap.fill(name, 20)}\nstep {step}" + (change and f"\n{change}")
    return f"{name}, step {step}" + (change and f"\n1 % quantile: {change}")


def draw_boxes(axes: Any, table: pd.DataFrame) -> None:
    """Draw the quantiles of every position bin, and the interval of the lowest."""
    values = table.pivot_table(index="first", columns="quantile", values="value")
    middle = values.index.to_numpy() + BIN_WIDTH / 2
    for low, high, colour, label in (
        (0.01, 0.99, LIGHT, "1 to 99 % of the tokens"),
        (0.05, 0.95, style.SKY, "5 to 95 % of the tokens"),
    ):
        height = values[high] - values[low]
        axes.bar(middle, height, 0.8 * BIN_WIDTH, values[low], color=colour, label=label)
    reach = 0.4 * BIN_WIDTH
    axes.hlines(values[0.5], middle - reach, middle + reach, color="black", lw=1.2, label="median")
    tail = table[table["quantile"] == QUANTILES[0]].sort_values("first")
    spread = [(tail["value"] - tail["low"]).clip(0), (tail["high"] - tail["value"]).clip(0)]
    options: dict[str, Any] = {"fmt": "o", "ms": 2.5, "lw": 1, "color": style.RED}
    axes.errorbar(
        middle, tail["value"], yerr=spread, label="1 % quantile, 95 % interval", **options
    )
    axes.axhline(0, color="black", lw=0.5)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Compute quantiles by bins of BIN_WIDTH positions with at least MIN_TOKENS tokens.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS for the first and the last step that all runs of a method saved.
    """
    from diagnostics.records.run_groups import common_saved_steps, group_by_method
    from diagnostics.stats import bootstrap_interval, round_significant
    from figures.collect.tokens import token_table

    records, generator = [], np.random.default_rng(0)
    for method, method_runs in group_by_method(runs).items():
        steps = common_saved_steps(method_runs)
        for step in sorted({steps[0], steps[-1]}):
            data = without_special_tokens(token_table(method_runs, step), method_runs[0])
            for number, bin_tokens in data.groupby(data["position"] // BIN_WIDTH):
                if len(bin_tokens) < MIN_TOKENS:
                    continue
                signal = -bin_tokens["cost"].to_numpy(float)
                groups = list(bin_tokens.groupby("cluster").indices.values())

                def lower(index: np.ndarray, x: Any = signal, parts: Any = groups) -> np.ndarray:
                    resample = np.concatenate([parts[int(i)] for i in index[:, 0]])
                    return np.asarray(np.quantile(x[resample], QUANTILES[0]))

                rows = np.arange(len(groups))[:, None]
                band = bootstrap_interval(rows, lower, generator, resamples=300)
                for q in QUANTILES:
                    low, high = map(float, band) if q == QUANTILES[0] else (np.nan, np.nan)
                    record = {"method": method, "step": step, "first": number * BIN_WIDTH}
                    record |= {"last": (number + 1) * BIN_WIDTH - 1, "tokens": len(bin_tokens)}
                    record |= {
                        "value": round_significant(float(np.quantile(signal, q))),
                        "quantile": q,
                    }
                    records.append(
                        record | {"low": round_significant(low), "high": round_significant(high)}
                    )
    return pd.DataFrame(records, columns=list(COLUMNS))


def without_special_tokens(data: pd.DataFrame, run: Path) -> pd.DataFrame:
    """Drop special tokens and the bytes of think tags that are spelled in bytes."""
    from diagnostics.records.vocabulary import load_run_vocabulary

    vocabulary = load_run_vocabulary(run)
    text = data["id"].map(vocabulary.name)
    special = data["id"].isin(vocabulary.special) | text.isin(list("<>/think"))
    return data[~special]
