"""Statistics that experiments share: rows of repetitions in, one line a key with an interval out.

A repetition (a world, a seed) is the sampling unit: it is resampled whole, so that everything
measured on it stays together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.stats import bootstrap_interval

SEED = 2603
"""Of the bootstrap's generator; a summary depends on its rows alone."""


def interval(
    rows: pd.DataFrame,
    name: str,
    keys: Sequence[str],
    statistic: Callable[..., Any] = np.median,
    unit: str = "seed",
) -> pd.DataFrame:
    """Columns keys, quantity, value, low, high, worlds: a statistic of `name` over units, by key.

    95 % percentile bootstrap; a key is a column of the (units, keys) table, resampled whole. A key
    that the rows lack is empty. `worlds` is the number of units.

    Raises:
      ValueError: two rows of one unit under one key, or a unit that lacks a key.
    """
    keyed = rows.assign(**{k: rows.get(k, np.nan) for k in keys})
    keyed[list(keys)] = keyed[list(keys)].astype(object).where(keyed[list(keys)].notna(), "")
    # refuses two rows of one unit under one key: a bug upstream, not something to average away
    wide = keyed.set_index([unit, *keys])[name].unstack(list(keys), sort=False)
    values = wide.to_numpy(dtype=np.float64)
    if np.isnan(values).any():
        count = int(np.isnan(values).sum())
        raise InvalidInput(f"{name}: {count} of {values.size} cells of {unit} x {keys} are missing")
    generator = np.random.default_rng(SEED)
    low, high = bootstrap_interval(values, lambda x: statistic(x, axis=0), generator)
    table = wide.columns.to_frame(index=False).replace("", np.nan)
    return table.assign(
        quantity=name, value=statistic(values, axis=0), low=low, high=high, worlds=len(values)
    )


def slopes(rows: pd.DataFrame, y: str, x: str, keys: Sequence[str]) -> pd.DataFrame:
    """Local exponents d log y / d log x between neighbouring x, one row each at the larger x.

    Columns keys, x and "slope". One slope over a whole range would hide a cross-over.
    """
    parts = []
    for key, mine in rows.groupby(list(keys), sort=False):
        mine = mine.sort_values(x)
        steps = np.diff(np.log(mine[y].to_numpy())) / np.diff(np.log(mine[x].to_numpy()))
        about = dict(zip(keys, key, strict=True))
        parts.append(pd.DataFrame({**about, x: mine[x].to_numpy()[1:], "slope": steps}))
    return pd.concat(parts, ignore_index=True)
