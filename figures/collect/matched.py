"""Tables of matched runs: evaluations with the tokens and seconds that led to them, and alarms.

A seed of these runs is another student, so that only what a method is must agree between them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.alarms.alarms import replay
from diagnostics.records import run_tables
from diagnostics.records.rows import Row
from diagnostics.records.run_cost import response_tokens
from diagnostics.records.run_folder import RunFolder
from diagnostics.records.run_groups import EVALUATED_ON
from figures.collect.paired import accuracy_interval, outcome_matrix
from figures.collect.steps import EVALUATION_COLUMNS, check_same_problems, label_runs

MATCHED_COLUMNS = (*EVALUATION_COLUMNS, "tokens", "seconds", "alarm", "alarm_step")
VARYING_SETTINGS = frozenset({"student", "teacher"})
"""Settings that differ between the seeds of a method: each has a student of its own."""
STAGES = ("rollout", "score", "update")
"""Stages of a step whose seconds count: all but the writing of its record."""
TOLERANCE = 1.02
"""An evaluation is within a budget if it costs at most this many times as much."""
COLLAPSE_SHARE = 0.5
"""A run collapses if an evaluation falls below this share of its best earlier one."""


def matched_table(runs: list[Path], varying: frozenset[str] = VARYING_SETTINGS) -> pd.DataFrame:
    """Build the table of evaluations of runs, each with the cost of the steps before it.

    Args:
        runs: Run folders.
        varying: Settings that differ between the seeds of a method by design; with EVALUATED_ON,
            each seed has problems of its own, which all its methods share.

    Returns:
        A table with MATCHED_COLUMNS, one row an evaluation: `tokens` and `seconds` are the response
        tokens of the training steps before it and their duration (STAGES); `alarm` is the first
        alarm of the run ("" if there is none), `alarm_step` its step.

    Raises:
        InvalidInput: Runs of one group and task were evaluated on different problems.
    """
    evaluations = run_tables.evaluations_table(runs)
    keys = ["group", *(["seed"] if EVALUATED_ON in varying else []), "task"]
    check_same_problems(label_runs(evaluations, runs, varying), runs, keys)
    parts = []
    for number, run in enumerate(runs):
        rows = RunFolder(run).rows()
        tokens, seconds = cumulative_cost(rows)
        part = evaluations[evaluations["run"] == number].copy()
        part["tokens"], part["seconds"] = tokens[part["step"]], seconds[part["step"]]
        alarms = replay(rows)
        part["alarm"] = alarms[0].rule.name if alarms else ""
        part["alarm_step"] = float(alarms[0].step) if alarms else np.nan
        parts.append(part)
    table = label_runs(pd.concat(parts, ignore_index=True), runs, varying)
    return table[list(MATCHED_COLUMNS)]


def cumulative_cost(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return the response tokens and the seconds of training before each step.

    Args:
        rows: Rows of a run, one a step from step 0.

    Returns:
        Two arrays with one entry more than rows: entry n is the sum over the first n steps.
    """
    tokens = [response_tokens(row) for row in rows]
    seconds = [sum(row[f"seconds/{stage}"] for stage in STAGES) for row in rows]
    return tuple(np.concatenate([[0.0], np.cumsum(values)]) for values in (tokens, seconds))  # type: ignore[return-value]


def learning_curve(evaluations: pd.DataFrame, method: str) -> pd.DataFrame:
    """Compute the accuracy of a method at each evaluation, and the mean cost until then.

    Args:
        evaluations: Rows of MATCHED_COLUMNS of one group.
        method: The method.

    Returns:
        A table with the columns step, tokens and seconds (means over seeds), accuracy, low and high
        (over seeds and problems). Steps that some seed lacks are left out.
    """
    rows = evaluations[evaluations["method"] == method]
    num_seeds = rows["seed"].nunique()
    records = []
    for step, step_rows in rows.groupby("step"):
        if step_rows["seed"].nunique() == num_seeds:
            outcomes = outcome_matrix(step_rows, method).to_numpy(float)
            cost = {name: step_rows[name].mean() for name in ("tokens", "seconds")}
            interval = dict(
                zip(("accuracy", "low", "high"), accuracy_interval(outcomes), strict=True)
            )
            records.append({"step": step, **cost, **interval})
    return pd.DataFrame(records)


def learning_curves(evaluations: pd.DataFrame, methods: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Return `learning_curve` of every method that has runs, in the order of `methods`."""
    present = set(evaluations["method"])
    return {name: learning_curve(evaluations, name) for name in methods if name in present}


def common_budget(curves: Mapping[str, pd.DataFrame], cost: str) -> float:
    """Return the largest cost that every method reaches: the smallest of their last ones.

    Args:
        curves: Learning curve of every method.
        cost: "tokens" or "seconds".

    Returns:
        The cost.
    """
    return min(float(curve[cost].iloc[-1]) for curve in curves.values())


def step_within(curve: pd.DataFrame, cost: str, budget: float) -> int:
    """Return the step of the last evaluation within a budget (see TOLERANCE)."""
    return int(curve[curve[cost] <= TOLERANCE * budget]["step"].max())


def collapsed_seeds(evaluations: pd.DataFrame, method: str) -> list[int]:
    """Return the seeds of a method whose runs collapse (COLLAPSE_SHARE)."""
    columns = ["seed", "step", "accuracy"]
    rows = evaluations.loc[evaluations["method"] == method, columns].sort_values("step")
    seeds = []
    for seed, run in rows.groupby("seed"):
        best = run["accuracy"].cummax().shift(fill_value=0.0)
        if (run["accuracy"] < COLLAPSE_SHARE * best).any():
            seeds.append(int(str(seed)))
    return seeds
