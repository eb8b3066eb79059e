"""Intervals over independent repetitions (seeds, draws of a world, prompts), by the bootstrap."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput

Array = NDArray[Any]


def bootstrap_interval(
    values: Array,
    statistic: Callable[[Array], Array],
    generator: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
    strata: Array | None = None,
) -> tuple[Array, Array]:
    """Percentile bootstrap interval of a statistic of repetitions.

    Whole repetitions are resampled, so everything measured on one stays together and intervals of
    differences or ratios are paired. With `strata`, each label keeps its number of repetitions.
    The interval covers only what differs between repetitions. (Efron 1979; stratified over tasks
    as in arXiv 2108.13264.)

    Args:
      values: (N, ...) one entry a repetition.
      statistic: (N, ...) -> any shape; must not depend on the order of repetitions.
      strata: (N,) labels, or None for one stratum.

    Returns:
      (low, high), each of the statistic's shape.

    Raises:
      ValueError: fewer than 2 repetitions in a stratum, or a level outside (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if not 0 < level < 1:
        raise InvalidInput(f"level is {level}, expected a number in (0, 1)")
    labels = np.zeros(len(values), dtype=np.int64) if strata is None else np.asarray(strata)
    if labels.shape != values.shape[:1]:
        raise InvalidInput(
            f"strata has shape {labels.shape}, values hold {len(values)} repetitions"
        )
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    smallest = min(map(len, groups), default=0)
    if smallest < 2:
        raise InvalidInput(f"a stratum holds {smallest} repetitions; an interval needs at least 2")
    drawn = [
        statistic(values[np.concatenate([generator.choice(g, size=len(g)) for g in groups])])
        for _ in range(resamples)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.stack(drawn), [tail, 1 - tail], axis=0)
    return low, high


def crossed_interval(
    values: Array, generator: np.random.Generator, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the grand mean of values crossed over runs and problems.

    Rows and columns are resampled independently, so that an unusual seed and an unusual problem
    both widen the interval; with one run it speaks of the problems alone. It errs on the wide side
    (the cell noise is counted twice). Few runs give few combinations: two or three seeds say little
    about seeds. (The pigeonhole bootstrap, Owen 2007.)

    Args:
      values: (N, M), N runs on the same M problems.

    Raises:
      ValueError: no run, fewer than 2 problems, or a level outside (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise InvalidInput(f"values have shape {values.shape}, expected (runs, problems >= 2)")
    if not 0 < level < 1:
        raise InvalidInput(f"level is {level}, expected a number in (0, 1)")
    n, m = values.shape
    runs = generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    problems = generator.multinomial(m, np.full(m, 1 / m), size=resamples) / m
    means = np.einsum("rn,nm,rm->r", runs, values, problems, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
