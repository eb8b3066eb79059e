"""Run folders in, one long table out; reads the record only, needs no torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields
from diagnostics.records.run_folders import (
    distinct_names,
    labels,
    recorded_evaluations,
    recorded_rows,
    settings,
)
from diagnostics.stats import gain_interval, unpaired_interval

KEPT = [
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
    """Long table (run, objective, seed, step, metric, value) of rows and evaluations.

    objective: its name, and in parentheses what else differs between the runs of one objective
    (`diagnostics.records.run_folders.distinct_names`), so that only seeds of one method share it. Rows of outcomes
    have two more columns, outcomes and problem_set.
    """
    records: list[dict[str, Any]] = []
    configs = [settings(run) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        check_fields(config, {"objective": str}, str(run / "config.json"))
    names = distinct_names(runs, [config["objective"] for config in configs])
    for run, config, objective, label in zip(runs, configs, names, labels(runs), strict=True):

        def about(
            row: dict[str, Any], label: str = label, config: Any = config, name: str = objective
        ) -> dict[str, Any]:
            """Of several tasks each counts as an objective of its own."""
            task = f" ({row['task']})" if row.get("task") else ""
            return {"run": label + task, "objective": name + task, "seed": config["seed"]}

        for row in recorded_rows(run):
            for metric in KEPT:
                if row.get(metric) is not None:
                    value = float(f"{row[metric]:.6g}")
                    records.append(
                        about(row) | {"step": row["step"], "metric": metric, "value": value}
                    )
        for row in recorded_evaluations(run):
            for metric in ("accuracy", "length", "truncated"):
                value = float(f"{row[metric]:.6g}")
                name = f"eval/{metric}"
                records.append(about(row) | {"step": row["step"], "metric": name, "value": value})
            outcomes = {"step": row["step"], "metric": "eval/outcomes", "value": float("nan")}
            outcomes |= {"outcomes": row["outcomes"], "problem_set": row.get("problem_set", "")}
            records.append(about(row) | outcomes)
    if not records:
        raise InvalidInput(f"no rows in {[str(run) for run in runs]}")
    return pd.DataFrame(records)


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each objective before and after training, from a training table.

    Columns objective, seeds, problems, before, after, gain, low, high, paired: over the runs that
    were evaluated twice, first and last. The 95 % interval is over runs and problems: of paired
    differences (`gain_interval`), or, where the last problems are not the first ones,
    of two independent accuracies (`unpaired_interval`).
    """
    evaluations = table[table["metric"] == "eval/outcomes"]
    found = []
    for objective, mine in evaluations.groupby("objective"):
        ends: dict[tuple[int, int, bool], list[tuple[np.ndarray, np.ndarray]]] = {}
        for _, run in mine.sort_values("step").groupby("run"):
            if len(run) > 1:
                before, after = (digits(run["outcomes"].iloc[i]) for i in (0, -1))
                sets = run.get("problem_set", pd.Series([""] * len(run))).fillna("")
                paired = len(before) == len(after) and sets.iloc[0] == sets.iloc[-1]
                ends.setdefault((len(before), len(after), paired), []).append((before, after))
        for (_, count, paired), both in ends.items():
            name = objective if len(ends) == 1 else f"{objective} ({count} problems)"
            before, after = (np.stack(x) for x in zip(*both, strict=True))
            low, high = (
                gain_interval(after - before) if paired else unpaired_interval(before, after)
            )
            accuracies = {"before": before.mean(), "after": after.mean()}
            gain = {"gain": after.mean() - before.mean(), "low": low, "high": high}
            counts = {"objective": name, "seeds": len(both), "problems": count}
            found.append({**counts, **accuracies, **gain, "paired": paired})
    return pd.DataFrame(found)


def digits(outcomes: str) -> np.ndarray:
    """(M,) share of right responses to each problem: see `opd.evaluation.statistics.written`."""
    problems = outcomes.split() if " " in outcomes else outcomes
    return np.array([np.mean([float(x) for x in samples]) for samples in problems])
