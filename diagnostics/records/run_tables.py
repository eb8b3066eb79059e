"""Long tables of the steps and the evaluations of runs. Needs no torch.

All tables of runs are made of these two: those of `opd report`, `opd demo` and the figures.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields
from diagnostics.records.rows import Row
from diagnostics.records.run_folder import RunFolder
from diagnostics.records.run_groups import distinct_names, folder_labels
from diagnostics.stats import (
    gain_interval,
    problem_accuracies,
    round_significant,
    unpaired_interval,
)

STEP_METRICS = (
    *("loss", "grad_norm"),
    *("divergence/reverse_kl", "divergence/k1"),
    *("divergence/student_entropy", "divergence/teacher_entropy"),
    *("signal/negative_share", "signal/negative_share_null"),
    *("signal/signal_n_eff_share", "signal/signal_top1_share"),
    *("signal/repeated_cost", "signal/regular_cost"),
    *("response/reward", "response/length", "response/truncated_share"),
    "repetition/repeated_share",
    *("episodes/turns", "episodes/invalid_share"),
    *(f"turn={number}/divergence/k1" for number in (1, 2, 4, 8)),
)
"""Columns of the rows of a run that tables keep."""
EVALUATION_METRICS = (
    *("accuracy", "length", "truncated"),
    *("episodes/turns", "episodes/invalid_share"),
)
"""Columns of the evaluations of a run that tables keep, besides the outcomes."""
RUN_LABELS = ["run", "step", "task"]
"""Columns that say which run, step and task a row of a table is about."""


def steps_table(runs: list[Path]) -> pd.DataFrame:
    """Build the table (run, step, task, metric, value) of the rows of runs.

    Args:
        runs: Run folders.

    Returns:
        One row per step, task and metric of STEP_METRICS that was recorded; `run` is the index in
        `runs`, and `task` is empty in a run of a single task.
    """
    records = [
        {"run": i, **labels, "metric": metric, "value": value}
        for i, run in enumerate(runs)
        for row in RunFolder(run).rows()
        for labels in (step_labels(row),)
        for metric, value in recorded_values(row, STEP_METRICS)
    ]
    return pd.DataFrame(records, columns=[*RUN_LABELS, "metric", "value"])


def evaluations_table(runs: list[Path]) -> pd.DataFrame:
    """Build the table of the evaluations of runs.

    Args:
        runs: Run folders.

    Returns:
        One row per evaluation of a task: run, step and task as in `steps_table`, EVALUATION_METRICS
        (NaN where not recorded), `outcomes` (see `problem_accuracies`) and `problem_set`.
    """
    columns = [*RUN_LABELS, *EVALUATION_METRICS, "outcomes", "problem_set"]
    records = [
        {"run": i, **step_labels(row), **dict(recorded_values(row, EVALUATION_METRICS))}
        | {"outcomes": row["outcomes"], "problem_set": row.get("problem_set", "")}
        for i, run in enumerate(runs)
        for row in RunFolder(run).evaluations()
    ]
    return pd.DataFrame(records, columns=columns)


def step_labels(row: Row) -> dict[str, Any]:
    """Return the step and the task of a row."""
    return {"step": row["step"], "task": row.get("task", "")}


def recorded_values(row: Row, metrics: Iterable[str]) -> list[tuple[str, float]]:
    """Return the metrics that a row has, with their values."""
    return [(name, row[name]) for name in metrics if row.get(name) is not None]


def training_table(runs: list[Path]) -> pd.DataFrame:
    """Build a long table (run, objective, seed, step, metric, value) of rows and evaluations.

    The objective column holds its name and, in parentheses, what else differs between the runs of
    one objective (`diagnostics.records.run_groups.distinct_names`), so that only seeds of one
    method share it. Several tasks count as different objectives. Evaluations have the metrics
    eval/accuracy, eval/length and eval/truncated, and eval/outcomes with two more columns, outcomes
    and problem_set.

    Args:
        runs: Run folders.

    Returns:
        The table, with six significant digits.

    Raises:
        InvalidInput: The runs have no rows.
    """
    folders = [RunFolder(run) for run in runs]
    for folder in folders:
        check_fields(folder.settings(), {"objective": str}, str(folder.path / "config.json"))
    names = distinct_names(runs, [folder.settings()["objective"] for folder in folders])
    evaluations = evaluations_table(runs)
    metrics = evaluations.melt(RUN_LABELS, list(EVALUATION_METRICS), var_name="metric")
    metrics = metrics.dropna(subset="value")
    outcomes = evaluations[[*RUN_LABELS, "outcomes", "problem_set"]].assign(metric="outcomes")
    evaluations = pd.concat([metrics, outcomes])
    evaluations["metric"] = "eval/" + evaluations["metric"]
    table = pd.concat([steps_table(runs), evaluations])
    table = table.sort_values("run", kind="stable", ignore_index=True)
    if table.empty:
        raise InvalidInput(f"no rows in {[str(run) for run in runs]}")
    task = table["task"].map(lambda name: f" ({name})" if name else "")
    run_index = table["run"]
    table["run"] = run_index.map(dict(enumerate(folder_labels(runs)))) + task
    table["objective"] = run_index.map(dict(enumerate(names))) + task
    table["seed"] = run_index.map({i: folder.seed for i, folder in enumerate(folders)})
    table["value"] = table["value"].map(lambda value: round_significant(value, 6))
    return table[["run", "objective", "seed", "step", "metric", "value", "outcomes", "problem_set"]]


def accuracy_gains(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy of each objective before and after training.

    Columns objective, seeds, problems, before, after, gain, low, high, paired: over the runs that
    were evaluated at least twice, first and last. The 95 % interval is over runs and problems: of
    paired differences (`gain_interval`), or, if the last problems are not the first ones, of two
    independent accuracies (`unpaired_interval`).

    Args:
        table: From `training_table`.

    Returns:
        One row per objective.
    """
    evaluations = table[table["metric"] == "eval/outcomes"]
    rows = []
    for objective, objective_rows in evaluations.groupby("objective"):
        outcome_pairs: dict[tuple[int, int, bool], list[tuple[np.ndarray, np.ndarray]]] = {}
        for _, run in objective_rows.sort_values("step").groupby("run"):
            if len(run) > 1:
                first_outcomes, last_outcomes = (
                    problem_accuracies(run["outcomes"].iloc[i]) for i in (0, -1)
                )
                problem_sets = run.get("problem_set", pd.Series([""] * len(run))).fillna("")
                paired = (
                    len(first_outcomes) == len(last_outcomes)
                    and problem_sets.iloc[0] == problem_sets.iloc[-1]
                )
                outcome_pairs.setdefault(
                    (len(first_outcomes), len(last_outcomes), paired), []
                ).append((first_outcomes, last_outcomes))
        for (_, count, paired), pairs in outcome_pairs.items():
            name = objective if len(outcome_pairs) == 1 else f"{objective} ({count} problems)"
            first_outcomes, last_outcomes = (np.stack(x) for x in zip(*pairs, strict=True))
            low, high = (
                gain_interval(last_outcomes - first_outcomes)
                if paired
                else unpaired_interval(first_outcomes, last_outcomes)
            )
            accuracies = {"before": first_outcomes.mean(), "after": last_outcomes.mean()}
            gain = {"gain": last_outcomes.mean() - first_outcomes.mean(), "low": low, "high": high}
            counts = {"objective": name, "seeds": len(pairs), "problems": count}
            rows.append({**counts, **accuracies, **gain, "paired": paired})
    return pd.DataFrame(rows)
