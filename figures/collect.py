"""Run folders in, one long table out; reads the record only, needs no torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import rows
from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.intervals import crossed_interval

KEPT = [
    "loss",
    "grad_norm",
    "drift/reverse_kl",
    "drift/k1",
    "drift/student_entropy",
    "drift/teacher_entropy",
    "supervision/negative_share",
    "supervision/negative_share_null",
    "supervision/signal_n_eff_share",
    "supervision/signal_top1_share",
    "collapse/reward",
    "collapse/length",
    "collapse/truncated_share",
    "collapse/repeated_share",
]


def training_table(runs: list[Path]) -> pd.DataFrame:
    """Long table (run, objective, seed, step, metric, value) of rows and evaluations."""
    records: list[dict[str, Any]] = []
    for run in runs:
        if not (run / "config.json").exists():
            raise MissingFile(f"{run} is no run folder: it has no config.json")
        config = json.loads((run / "config.json").read_text())

        def about(row: dict[str, Any], run: Path = run, config: Any = config) -> dict[str, Any]:
            """Of several tasks each counts as an objective of its own."""
            task = f" ({row['task']})" if row.get("task") else ""
            name = config["objective"] + task
            return {"run": run.name + task, "objective": name, "seed": config["seed"]}

        for row in rows.read(run / "rows.jsonl"):
            for metric in KEPT:
                if row.get(metric) is not None:
                    value = float(f"{row[metric]:.6g}")
                    records.append(
                        about(row) | {"step": row["step"], "metric": metric, "value": value}
                    )
        for row in rows.read(run / "evals.jsonl"):
            for metric in ("accuracy", "length", "truncated"):
                value = float(f"{row[metric]:.6g}")
                name = f"eval/{metric}"
                records.append(about(row) | {"step": row["step"], "metric": name, "value": value})
            outcomes = {"step": row["step"], "metric": "eval/outcomes", "value": float("nan")}
            records.append(about(row) | outcomes | {"outcomes": row["outcomes"]})
    if not records:
        raise InvalidInput(f"no rows in {[str(run) for run in runs]}")
    return pd.DataFrame(records)


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each objective before and after training, from a training table.

    Columns objective, seeds, problems, before, after, gain, low, high: pooled over the runs that
    were evaluated twice on the same problems; the 95 % interval of the paired gain resamples runs
    and problems (`crossed_interval`).
    """
    evaluations = table[table["metric"] == "eval/outcomes"]
    found = []
    for objective, mine in evaluations.groupby("objective"):
        ends = [
            (digits(run["outcomes"].iloc[0]), digits(run["outcomes"].iloc[-1]))
            for _, run in mine.sort_values("step").groupby("run")
            if len(run) > 1
        ]
        if not ends:
            continue
        before, after = (np.stack(x) for x in zip(*ends, strict=True))
        low, high = crossed_interval(after - before, np.random.default_rng(0))
        found.append(
            {
                "objective": objective,
                "seeds": len(ends),
                "problems": before.shape[1],
                "before": before.mean(),
                "after": after.mean(),
                "gain": (after - before).mean(),
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(found)


def digits(outcomes: str) -> np.ndarray:
    """(M,) share of right responses to each problem: see `opd.accuracy.written`."""
    problems = outcomes.split() if " " in outcomes else outcomes
    return np.array([np.mean([float(x) for x in samples]) for samples in problems])
