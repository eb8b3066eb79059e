"""Tables of training steps and of evaluations from run folders; needs no torch.

A run folder is GROUP/METHOD-SEED, such as those that `opd paper` makes.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.records import run_tables
from diagnostics.records.run_folder import RunFolder
from diagnostics.records.run_groups import check_same_method
from diagnostics.stats import round_significant, t_critical

PAPER_METRICS = {
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
"""Column of the table to one of `diagnostics.records.run_tables.STEP_METRICS`."""
STEP_COLUMNS = ("group", "method", "seed", "step", "task", *PAPER_METRICS, "accuracy")
EVALUATION_COLUMNS = (
    *("group", "method", "seed", "step", "task"),
    *("accuracy", "length", "truncated", "outcomes"),
)


def parse_run_folders(runs: list[Path], varying: frozenset[str] = frozenset()) -> pd.DataFrame:
    """Return group, method and seed of each run folder.

    Args:
        runs: Run folders.
        varying: Settings that differ between the seeds of a method by design, such as the student.

    Returns:
        A table with the columns group, method and seed, one row a run, in order.

    Raises:
        MissingFile: A folder is not a run folder.
        InvalidInput: Runs of one group and method differ in more than the seed (see
            `diagnostics.records.run_groups.differing_settings`).
    """
    folders = [RunFolder(run) for run in runs]
    labels = [{"group": x.group, "method": x.method, "seed": x.seed} for x in folders]
    table = pd.DataFrame(labels, columns=["group", "method", "seed"])
    for (group, method), rows in table.groupby(["group", "method"], sort=False):
        check_same_method(f"{group}/{method}", [runs[i] for i in rows.index], varying)
    return table


def steps_table(runs: list[Path]) -> pd.DataFrame:
    """Build the table of training steps, one row a step and task, in the order of the runs.

    Args:
        runs: Run folders.

    Returns:
        A table with STEP_COLUMNS and four significant digits. `accuracy` is that on held-out
        problems before the step, where the run was evaluated. The last row of a run has nothing
        else: it is the evaluation after the last step.
    """
    evaluations = run_tables.evaluations_table(runs).rename(columns={"accuracy": "value"})
    values = [run_tables.steps_table(runs), evaluations.assign(metric="accuracy")]
    table = label_runs(pivot_metrics(pd.concat(values)), runs)
    names = {metric: name for name, metric in PAPER_METRICS.items()}
    return table.rename(columns=names).reindex(columns=list(STEP_COLUMNS))


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
    table = label_runs(run_tables.evaluations_table(runs), runs)
    check_same_problems(table, runs, ["group", "task"])
    return table[list(EVALUATION_COLUMNS)]


def pivot_metrics(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row per run, step and task, and a column per metric."""
    index = run_tables.RUN_LABELS
    wide = table.pivot_table(index=index, columns="metric", values="value", aggfunc="last")
    return wide.reset_index().astype({"run": int, "step": int})


def label_runs(
    table: pd.DataFrame, runs: list[Path], varying: frozenset[str] = frozenset()
) -> pd.DataFrame:
    """Add group, method and seed of the runs to a table, and round it to four digits.

    Args:
        table: A table with the column run, the index in `runs`.
        runs: Run folders.
        varying: Settings that differ between the seeds of a method by design.

    Returns:
        The table with three more columns.
    """
    numbers = table.select_dtypes("number").columns.difference(["run", "step"])
    rounded = table.assign(**{name: table[name].map(round_metric) for name in numbers})
    return rounded.join(parse_run_folders(runs, varying), on="run")


def check_same_problems(table: pd.DataFrame, runs: list[Path], keys: list[str]) -> None:
    """Raise if runs were evaluated on different problems.

    Args:
        table: Evaluations with the columns run and problem_set.
        runs: Run folders.
        keys: Columns within whose values the problems must be the same.

    Raises:
        InvalidInput: The message names a run, its problems and the other runs' problems.
    """
    for values, rows in table.groupby(keys, sort=False):
        first = rows["problem_set"].iloc[0]
        for run, problems in zip(rows["run"], rows["problem_set"], strict=True):
            if problems != first:
                label = " ".join(filter(None, map(str, values)))
                raise InvalidInput(
                    f"{runs[run]} was evaluated on the problems {problems}, others of {label} on "
                    f"{first}: leave it out or evaluate it again"
                )


def round_metric(value: float | None) -> float:
    """Round a metric to four significant digits; NaN for None."""
    return round_significant(value, 4)


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
    methods = sorted(methods)
    selected = table[(table["group"] == group) & table["method"].isin(methods)]
    if selected.empty:
        names = sorted({f"{g}/{m}" for g, m in zip(table["group"], table["method"], strict=True)})
        raise InvalidInput(
            f"no run of the group {group!r} uses one of the methods {', '.join(methods)}; run "
            "folders must "
            f"be named GROUP/METHOD-SEED, as by `opd paper`; found {', '.join(names)}"
        )
    return selected


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
    values = table[["step", "seed", column]].dropna(subset=[column])
    by_seed = values.pivot_table(index="step", columns="seed", values=column)
    by_seed = by_seed.dropna()
    if log:
        by_seed = np.log(by_seed[(by_seed > 0).all(axis=1)])
    num_seeds, mean = by_seed.shape[1], by_seed.mean(axis=1)
    half_width = (
        t_critical(max(num_seeds - 1, 1)) * by_seed.std(axis=1, ddof=1) / np.sqrt(max(num_seeds, 1))
    )
    intervals = pd.DataFrame({"value": mean, "low": mean - half_width, "high": mean + half_width})
    intervals = (np.exp(intervals) if log else intervals).assign(seeds=num_seeds)
    return intervals.rename_axis("step").reset_index()
