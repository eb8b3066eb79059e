"""Tables of training steps and of evaluations from run folders; needs no torch.

A run folder is GROUP/METHOD-SEED, such as those that `opd paper` makes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.records.run_folders import (
    check_same_method,
    load_evaluations,
    load_rows,
    load_settings,
)

STEP_METRICS = {
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
"""Column of the table to metric of a row."""
STEP_COLUMNS = ("group", "method", "seed", "step", "task", *STEP_METRICS, "accuracy")
EVALUATION_COLUMNS = (
    *("group", "method", "seed", "step", "task"),
    *("accuracy", "length", "truncated", "outcomes"),
)


def parse_run_folders(runs: list[Path]) -> list[dict[str, Any]]:
    """Return group, method and seed of each run folder.

    Args:
        runs: Run folders.

    Returns:
        A dictionary with the keys group, method and seed for each run.

    Raises:
        MissingFile: A folder is not a run folder.
        InvalidInput: Runs of one group and method differ in more than the seed (see
            `diagnostics.records.run_folders.differing_settings`).
    """
    labels, runs_by_method = [], dict[tuple[str, str], list[Path]]()
    for run in runs:
        seed = load_settings(run)["seed"]
        method, group = run.name.removesuffix(f"-{seed}"), run.resolve().parent.name
        labels.append({"group": group, "method": method, "seed": seed})
        runs_by_method.setdefault((group, method), []).append(run)
    for (group, method), folders in runs_by_method.items():
        check_same_method(f"{group}/{method}", folders)
    return labels


def steps_table(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps.

    Args:
        runs: Run folders.

    Returns:
        A table with STEP_COLUMNS, one row a step and task, with four significant digits. `accuracy`
        is that on held-out problems before the step, where the run was evaluated. The last row of a
        run has nothing else: it is the evaluation after the last step.
    """
    records: list[dict[str, Any]] = []
    for run, labels in zip(runs, parse_run_folders(runs), strict=True):
        rows_by_step: dict[tuple[int, str], dict[str, Any]] = {}
        for row in load_rows(run):
            record = rows_by_step.setdefault((row["step"], row.get("task", "")), {})
            record.update(
                {name: round_metric(row.get(column)) for name, column in STEP_METRICS.items()}
            )
        for row in load_evaluations(run):
            record = rows_by_step.setdefault((row["step"], row.get("task", "")), {})
            record["accuracy"] = round_metric(row["accuracy"])
        records += [
            labels | {"step": s, "task": t} | x for (s, t), x in sorted(rows_by_step.items())
        ]
    return pd.DataFrame(records, columns=list(STEP_COLUMNS))


def evaluations_table(runs: list[Path]) -> pd.DataFrame:
    """Build the table of evaluations.

    Args:
        runs: Run folders.

    Returns:
        A table with EVALUATION_COLUMNS, one row an evaluation of a task; `outcomes` has one digit a
        problem.

    Raises:
        InvalidInput: Runs of one group and task were evaluated on different problems.
    """
    records: list[dict[str, Any]] = []
    problem_sets: dict[tuple[str, str], str] = {}
    for run, labels in zip(runs, parse_run_folders(runs), strict=True):
        for row in load_evaluations(run):
            task, problems = row.get("task", ""), row.get("problem_set", "")
            if problem_sets.setdefault((labels["group"], task), problems) != problems:
                raise InvalidInput(
                    f"{run} was evaluated on the problems {problems}, others of {labels['group']} "
                    f"on {problem_sets[labels['group'], task]}: leave it out or evaluate it again"
                )
            record = {"step": row["step"], "task": task, "outcomes": row["outcomes"]}
            record |= {
                name: round_metric(row[name]) for name in ("accuracy", "length", "truncated")
            }
            records.append(labels | record)
    return pd.DataFrame(records, columns=list(EVALUATION_COLUMNS))


def select_methods(table: pd.DataFrame, group: str, methods: Iterable[str]) -> pd.DataFrame:
    """Select the rows of a group that belong to one of the methods.

    Args:
        table: A table of steps or evaluations.
        group: Group to select.
        methods: Names of methods.

    Returns:
        The selected rows.

    Raises:
        InvalidInput: There are none; the message lists the runs that the table has.
    """
    selected = table[(table["group"] == group) & table["method"].isin(list(methods))]
    if selected.empty:
        names = sorted({f"{g}/{m}" for g, m in zip(table["group"], table["method"], strict=True)})
        raise InvalidInput(
            f"no run of the group {group!r} uses one of the methods {', '.join(methods)}; run "
            "folders must "
            f"be named GROUP/METHOD-SEED, as by `opd paper`; found {', '.join(names)}"
        )
    return selected


def round_metric(value: float | None) -> float:
    """Round a metric to four significant digits; NaN for None."""
    return float("nan") if value is None else float(f"{value:.4g}")


def seed_means(table: pd.DataFrame, column: str, log: bool = False) -> pd.DataFrame:
    """Compute the mean of a column over seeds at each step, with its 95 % interval by Student's t.

    Args:
        table: A table with the columns step and seed.
        column: Column to average.
        log: Take a geometric mean, and its interval in logarithms.

    Returns:
        A table with the columns step, value, low, high and seeds. Steps that some seed lacks are
        left out. With one seed the ends of the interval are NaN.
    """
    from scipy.stats import t

    by_seed = table.dropna(subset=[column]).pivot_table(index="step", columns="seed", values=column)
    by_seed = by_seed.dropna()
    if log:
        by_seed = np.log(by_seed[(by_seed > 0).all(axis=1)])
    num_seeds, mean = by_seed.shape[1], by_seed.mean(axis=1)
    half_width = (
        t.ppf(0.975, max(num_seeds - 1, 1))
        * by_seed.std(axis=1, ddof=1)
        / np.sqrt(max(num_seeds, 1))
    )
    intervals = pd.DataFrame({"value": mean, "low": mean - half_width, "high": mean + half_width})
    intervals = (np.exp(intervals) if log else intervals).assign(seeds=num_seeds)
    return intervals.rename_axis("step").reset_index()
