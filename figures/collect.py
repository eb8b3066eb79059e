"""Run folders in, one long table out; reads the record only, needs no torch."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

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
            raise FileNotFoundError(f"{run} is no run folder: it has no config.json")
        config = json.loads((run / "config.json").read_text())
        about = {"run": run.name, "objective": config["objective"], "seed": config["seed"]}
        for row in read_rows(run / "rows.jsonl"):
            for metric in KEPT:
                if row.get(metric) is not None:
                    value = float(f"{row[metric]:.6g}")
                    records.append(about | {"step": row["step"], "metric": metric, "value": value})
        for row in read_rows(run / "evals.jsonl"):
            for metric in ("accuracy", "length", "truncated"):
                value = float(f"{row[metric]:.6g}")
                name = f"eval/{metric}"
                records.append(about | {"step": row["step"], "metric": name, "value": value})
            outcomes = {"step": row["step"], "metric": "eval/outcomes", "value": float("nan")}
            records.append(about | outcomes | {"outcomes": row["outcomes"]})
    if not records:
        raise ValueError(f"no rows in {[str(run) for run in runs]}")
    return pd.DataFrame(records)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole JSON lines of a file; a last line that is still being written is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
