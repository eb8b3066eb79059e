"""The gap log q - log p by position at the first and the last step (the paper's figure 4)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.paper.dynamics import METHODS

COLUMNS = ("method", "step", "first", "last", "tokens", "quantile", "value", "low", "high")
CAPTION = (
    "log q - log p of sampled tokens by position. Boxes: 5 to 95 % quantiles; whiskers: 1 to 99 "
    "%; black: median; red: 95 % interval of the 1 % quantile (bootstrap over prompts). The axis "
    "is linear within 0.01. Think tags and EOS are excluded. These models are sure of most "
    "tokens, so the paper's boxes of the middle half would be flat. The paper has positions up to "
    "16k, at step 80 of sampled-token training, and no intervals; its claim is that the lower "
    "tail widens with the position."
)
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
BIN_WIDTH, MIN_TOKENS = 16, 200


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: its first saved step on the left and its last on the right."""
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = style.make_panels(len(methods), 2, 0.4 + 1.75 * len(methods), width=width)
    lowest = table["low"].min()
    for i, method in enumerate(methods):
        method_rows = table[table["method"] == method]
        steps = sorted(method_rows["step"].unique())
        for ax, step in zip(axes[2 * i : 2 * i + 2], (steps[0], steps[-1]), strict=True):
            draw_boxes(ax, method_rows[method_rows["step"] == step])
            ax.set_title(f"{METHODS.get(method, (method,))[0]}, step {step}")
            ax.set_yscale("symlog", linthresh=0.01)
            ax.set(ylim=(1.5 * lowest, 3), yticks=[-10, -1, -0.1, 0, 0.1, 1])
        axes[2 * i].set_ylabel("log q - log p")
    for ax in axes[-2:]:
        ax.set_xlabel("position in the response")
    return figure


def draw_boxes(axes: Any, table: pd.DataFrame) -> None:
    """Draw the quantiles of every position bin."""
    quantiles = table.pivot_table(index=["first", "last"], columns="quantile", values="value")
    low = table[table["quantile"] == QUANTILES[0]].set_index(["first", "last"])
    for (first, last), row in quantiles.iterrows():
        middle = (first + last + 1) / 2
        axes.plot([middle] * 2, [row[0.01], row[0.99]], color=style.BLUE, lw=0.9)
        axes.bar(middle, row[0.95] - row[0.05], 0.6 * BIN_WIDTH, row[0.05], color=style.SKY)
        axes.plot([middle - 5, middle + 5], [row[0.5]] * 2, color="black", lw=1)
        interval = low.loc[(first, last)]
        axes.plot(
            [middle] * 2, [interval["low"], interval["high"]], color=style.RED, lw=2.2, alpha=0.6
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
