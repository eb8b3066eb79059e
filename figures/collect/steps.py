"""Run folders as two tables: a row a step, and a row an evaluation; needs no torch.

A run folder is GROUP/METHOD-SEED. `opd paper` makes such folders, and so may anybody.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.records.run_folders import (
    recorded_evaluations,
    recorded_rows,
    refuse_unlike,
    settings,
)

KEPT = {
    "reward": "response/reward",
    "length": "response/length",
    "truncated": "response/truncated_share",
    "repeated": "repetition/repeated_share",
    "repeated_cost": "signal/repeated_cost",
    "regular_cost": "signal/regular_cost",
    "grad_norm": "grad_norm",
    "entropy": "divergence/student_entropy",
    "cost": "divergence/k1",
    "negative_null": "signal/negative_share_null",
}
"""Column of the table to column of a row."""
STEP_COLUMNS = ("group", "method", "seed", "step", "task", *KEPT, "accuracy")
EVALUATION_COLUMNS = (
    *("group", "method", "seed", "step", "task"),
    *("accuracy", "length", "truncated", "outcomes"),
)


def about(runs: list[Path]) -> list[dict[str, Any]]:
    """Group, method and seed of each run folder.

    Raises:
      FileNotFoundError: one is not a run folder.
      ValueError: runs of one group and method are no seeds of it (`diagnostics.records.run_folders.differing`).
    """
    found, alike = [], dict[tuple[str, str], list[Path]]()
    for run in runs:
        seed = settings(run)["seed"]
        method, group = run.name.removesuffix(f"-{seed}"), run.resolve().parent.name
        found.append({"group": group, "method": method, "seed": seed})
        alike.setdefault((group, method), []).append(run)
    for (group, method), folders in alike.items():
        refuse_unlike(f"{group}/{method}", folders)
    return found


def steps(runs: list[Path]) -> pd.DataFrame:
    """STEP_COLUMNS, a row a step and task, numbers to four significant digits.

    accuracy: on held-out problems before the step, where a run was evaluated; a last row, which
    has nothing else, is the evaluation after the last step.
    """
    found: list[dict[str, Any]] = []
    for run, about_it in zip(runs, about(runs), strict=True):
        mine: dict[tuple[int, str], dict[str, Any]] = {}
        for row in recorded_rows(run):
            of = mine.setdefault((row["step"], row.get("task", "")), {})
            of.update({name: rounded(row.get(column)) for name, column in KEPT.items()})
        for row in recorded_evaluations(run):
            of = mine.setdefault((row["step"], row.get("task", "")), {})
            of["accuracy"] = rounded(row["accuracy"])
        found += [about_it | {"step": s, "task": t} | x for (s, t), x in sorted(mine.items())]
    return pd.DataFrame(found, columns=list(STEP_COLUMNS))


def evaluations(runs: list[Path]) -> pd.DataFrame:
    """EVALUATION_COLUMNS, a row an evaluation of a task; outcomes has a digit a problem.

    Raises:
      ValueError: runs of one group and task were judged on different problems.
    """
    found: list[dict[str, Any]] = []
    judged: dict[tuple[str, str], str] = {}
    for run, about_it in zip(runs, about(runs), strict=True):
        for row in recorded_evaluations(run):
            task, problems = row.get("task", ""), row.get("problem_set", "")
            if judged.setdefault((about_it["group"], task), problems) != problems:
                raise InvalidInput(
                    f"{run} was judged on the problems {problems}, others of {about_it['group']} "
                    f"on {judged[about_it['group'], task]}: leave it out, or evaluate it anew"
                )
            of = {"step": row["step"], "task": task, "outcomes": row["outcomes"]}
            of |= {name: rounded(row[name]) for name in ("accuracy", "length", "truncated")}
            found.append(about_it | of)
    return pd.DataFrame(found, columns=list(EVALUATION_COLUMNS))


def chosen(table: pd.DataFrame, group: str, methods: Iterable[str]) -> pd.DataFrame:
    """The rows of a group that are of one of the methods.

    Raises:
      InvalidInput: there are none; names what the table has instead.
    """
    mine = table[(table["group"] == group) & table["method"].isin(list(methods))]
    if mine.empty:
        names = sorted({f"{g}/{m}" for g, m in zip(table["group"], table["method"], strict=True)})
        raise InvalidInput(
            f"no run of the group {group!r} with a method of {', '.join(methods)}; a run folder is "
            f"GROUP/METHOD-SEED, as `opd paper` makes them, and these are {', '.join(names)}"
        )
    return mine


def rounded(value: float | None) -> float:
    return float("nan") if value is None else float(f"{value:.4g}")


def over_seeds(table: pd.DataFrame, column: str, log: bool = False) -> pd.DataFrame:
    """By step: mean over seeds with its 95 % interval by Student's t; NaN bounds with one seed.

    Columns step, value, low, high, seeds. Steps that not every seed has are left out. With `log`
    the mean is geometric, and its interval is taken in logarithms.
    """
    from scipy.stats import t

    by = table.dropna(subset=[column]).pivot_table(index="step", columns="seed", values=column)
    by = by.dropna()
    if log:
        by = np.log(by[(by > 0).all(axis=1)])
    n, mean = by.shape[1], by.mean(axis=1)
    half = t.ppf(0.975, max(n - 1, 1)) * by.std(axis=1, ddof=1) / np.sqrt(max(n, 1))
    found = pd.DataFrame({"value": mean, "low": mean - half, "high": mean + half})
    found = (np.exp(found) if log else found).assign(seeds=n)
    return found.rename_axis("step").reset_index()
