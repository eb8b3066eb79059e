"""Long tables of training rows and evaluations from run folders. Needs no torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields
from diagnostics.records.run_folders import (
    distinct_names,
    folder_labels,
    load_evaluations,
    load_rows,
    load_settings,
)
from diagnostics.stats import gain_interval, unpaired_interval

TABLE_METRICS = [
    "loss",
    "grad_norm",
    "divergence/reverse_kl",
    "divergence/k1",
    "divergence/student_entropy",
    "divergence/teacher_entropy",
    "signal/negative_share",
    "signal/negative_share_null",
    "signal/signal_n_eff_share",
    "signal/signal_top1_share",
    "response/reward",
    "response/length",
    "response/truncated_share",
    "repetition/repeated_share",
]


def training_table(runs: list[Path]) -> pd.DataFrame:
    """Build a long table (run, objective, seed, step, metric, value) of rows and evaluations.

    The objective column holds its name and, in parentheses, what else differs between the runs of
    one objective (`diagnostics.records.run_folders.distinct_names`), so that only seeds of one
    method share it. Rows of outcomes have two more columns, outcomes and problem_set.

    Args:
        runs: Run folders.

    Returns:
        The table.

    Raises:
        InvalidInput: The runs have no rows.
    """
    records: list[dict[str, Any]] = []
    configs = [load_settings(run) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        check_fields(config, {"objective": str}, str(run / "config.json"))
    names = distinct_names(runs, [config["objective"] for config in configs])
    for run, config, objective, label in zip(
        runs, configs, names, folder_labels(runs), strict=True
    ):

        def row_labels(
            row: dict[str, Any], label: str = label, config: Any = config, name: str = objective
        ) -> dict[str, Any]:
            """Return the label columns of a row; several tasks count as different objectives."""
            task = f" ({row['task']})" if row.get("task") else ""
            return {"run": label + task, "objective": name + task, "seed": config["seed"]}

        for row in load_rows(run):
            for metric in TABLE_METRICS:
                if row.get(metric) is not None:
                    value = float(f"{row[metric]:.6g}")
                    records.append(
                        row_labels(row) | {"step": row["step"], "metric": metric, "value": value}
                    )
        for row in load_evaluations(run):
            for metric in ("accuracy", "length", "truncated"):
                value = float(f"{row[metric]:.6g}")
                name = f"eval/{metric}"
                records.append(
                    row_labels(row) | {"step": row["step"], "metric": name, "value": value}
                )
            outcomes = {"step": row["step"], "metric": "eval/outcomes", "value": float("nan")}
            outcomes |= {"outcomes": row["outcomes"], "problem_set": row.get("problem_set", "")}
            records.append(row_labels(row) | outcomes)
    if not records:
        raise InvalidInput(f"no rows in {[str(run) for run in runs]}")
    return pd.DataFrame(records)


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


def problem_accuracies(outcomes: str) -> np.ndarray:
    """Return (M,) shares of correct responses to each problem, from encoded outcomes.

    Args:
        outcomes: See `opd.evaluation.statistics.encode_outcomes`.

    Returns:
        The shares.
    """
    problems = outcomes.split() if " " in outcomes else outcomes
    return np.array([np.mean([float(x) for x in samples]) for samples in problems])
