"""The teacher's gap to the student by position, first and last step (the paper's figure 4)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.paper.dynamics import METHODS

COLUMNS = ("method", "step", "first", "last", "tokens", "quantile", "value", "low", "high")
CAPTION = (
    "log q - log p of sampled tokens by position: boxes from the 5 to the 95 % quantile, whiskers"
    " from 1 to 99 %, the median in black, red the 95 % interval of the lowest one (bootstrap "
    "over prompts); the axis is linear within 0.01. Think tags and ends are left out. These "
    "models are sure of most tokens, so that the paper's boxes of half the tokens would be flat. "
    "The paper has positions up to 16k, at step 80 of training by sampled tokens, and no "
    "intervals; its claim is a lower tail that widens with the position."
)
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
WIDTH, FEWEST = 16, 200


def draw(table: pd.DataFrame) -> Figure:
    """A row a method, its first saved step on the left and its last on the right."""
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = style.panels(len(methods), 2, 0.4 + 1.75 * len(methods))
    lowest = table["low"].min()
    for i, method in enumerate(methods):
        mine = table[table["method"] == method]
        steps = sorted(mine["step"].unique())
        for place, step in zip(axes[2 * i : 2 * i + 2], (steps[0], steps[-1]), strict=True):
            boxes(place, mine[mine["step"] == step])
            place.set_title(f"{METHODS.get(method, (method,))[0]}, step {step}")
            place.set_yscale("symlog", linthresh=0.01)
            place.set(ylim=(1.5 * lowest, 3), yticks=[-10, -1, -0.1, 0, 0.1, 1])
        axes[2 * i].set_ylabel("log q - log p")
    for place in axes[-2:]:
        place.set_xlabel("position in the response")
    return figure


def boxes(axes: Any, table: pd.DataFrame) -> None:
    by = table.pivot_table(index=["first", "last"], columns="quantile", values="value")
    low = table[table["quantile"] == QUANTILES[0]].set_index(["first", "last"])
    for (first, last), row in by.iterrows():
        middle = (first + last + 1) / 2
        axes.plot([middle] * 2, [row[0.01], row[0.99]], color=style.BLUE, lw=0.9)
        axes.bar(middle, row[0.95] - row[0.05], 0.6 * WIDTH, row[0.05], color=style.SKY)
        axes.plot([middle - 5, middle + 5], [row[0.5]] * 2, color="black", lw=1)
        ends = low.loc[(first, last)]
        axes.plot([middle] * 2, [ends["low"], ends["high"]], color=style.RED, lw=2.2, alpha=0.6)
    axes.axhline(0, color="black", lw=0.5)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Quantiles by bins of WIDTH positions that hold at least FEWEST tokens."""
    from diagnostics.records.run_folders import methods, saved, short
    from diagnostics.stats import bootstrap_interval
    from figures.collect.tokens import tokens

    found, generator = [], np.random.default_rng(0)
    for method, mine in methods(runs).items():
        steps = saved(mine)
        for step in sorted({steps[0], steps[-1]}):
            data = plain(tokens(mine, step), mine[0])
            for number, some in data.groupby(data["position"] // WIDTH):
                if len(some) < FEWEST:
                    continue
                signal = -some["cost"].to_numpy(float)
                groups = list(some.groupby("cluster").indices.values())

                def lower(index: np.ndarray, x: Any = signal, parts: Any = groups) -> np.ndarray:
                    drawn = np.concatenate([parts[int(i)] for i in index[:, 0]])
                    return np.asarray(np.quantile(x[drawn], QUANTILES[0]))

                rows = np.arange(len(groups))[:, None]
                band = bootstrap_interval(rows, lower, generator, resamples=300)
                for q in QUANTILES:
                    low, high = map(float, band) if q == QUANTILES[0] else (np.nan, np.nan)
                    about = {"method": method, "step": step, "first": number * WIDTH}
                    about |= {"last": (number + 1) * WIDTH - 1, "tokens": len(some)}
                    about |= {"value": short(float(np.quantile(signal, q))), "quantile": q}
                    found.append(about | {"low": short(low), "high": short(high)})
    return pd.DataFrame(found, columns=list(COLUMNS))


def plain(data: pd.DataFrame, run: Path) -> pd.DataFrame:
    """Without special tokens and the bytes of spelled think tags."""
    from diagnostics.records.vocabulary import read

    vocabulary = read(run)
    text = data["id"].map(vocabulary.name)
    special = data["id"].isin(vocabulary.special) | text.isin(list("<>/think"))
    return data[~special]
