"""The table of the map of methods, and gains of methods in a regime.

A run folder is REGIME/METHOD-SEED, such as those that `opd map` makes. A seed is another pair of
models, so that pairs are the sampling unit of a claim about methods, and problems lie within them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import InvalidInput
from diagnostics.records.run_folder import RunFolder
from diagnostics.records.run_groups import EVALUATED_ON
from diagnostics.stats import gain_interval, round_significant
from figures.collect.matched import MATCHED_COLUMNS, collapsed_seeds, matched_table
from figures.collect.paired import last_evaluations, outcome_matrix

MIN_PAIRS = 5
"""Pairs of models that a regime needs for a claim."""
PAIR_KNOBS = ("foreign_tags", "tag_log_probability")
"""Knobs of a pair that its columns repeat."""
PAIR_MEASUREMENTS = ("foreign_share", "foreign_gap", "reverse_kl", "teacher_accuracy")
"""Measurements of a pair before training that its columns repeat.

The share of foreign tokens in the student's responses; the mean of log p - log q of these tokens,
student and teacher, in nats; KL(student || teacher) in nats per token; the teacher's accuracy.
"""
COLUMNS = ("family", *MATCHED_COLUMNS, *PAIR_KNOBS, *PAIR_MEASUREMENTS)
VARYING = frozenset({"student", "teacher", "task", "eval_task", EVALUATED_ON})
"""What differs between the pairs of a regime; each pair has problems of its own."""


def regimes_table(runs: list[Path]) -> pd.DataFrame:
    """Build the table of evaluations of the runs of a map.

    Args:
        runs: Run folders, whose students lie in folders with a pair.json.

    Returns:
        A table with COLUMNS, one row an evaluation. `group` is the regime and `seed` the pair.

    Raises:
        InvalidInput: A run has no pair.json beside its student.
    """
    table = matched_table(runs, VARYING)
    facts = pd.DataFrame([pair_columns(run) for run in runs])
    keys = ["group", "method", "seed"]
    labels = pd.DataFrame(
        [{"group": x.group, "method": x.method, "seed": x.seed} for x in map(RunFolder, runs)]
    )
    return table.merge(pd.concat([labels, facts], axis=1), on=keys)[list(COLUMNS)]


def pair_columns(run: Path) -> dict[str, Any]:
    """Return the columns that describe the pair of models of a run.

    Args:
        run: A run folder.

    Returns:
        family, PAIR_KNOBS and PAIR_MEASUREMENTS.

    Raises:
        InvalidInput: There is no pair.json beside the student.
    """
    student = Path(str(RunFolder(run).settings()["student"]))
    path = student.parent / "pair.json"
    if not path.exists():
        raise InvalidInput(
            f"{run}: its student {student} does not belong to a pair of `opd lab --family` "
            f"(no {path}); leave the run out"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    columns = {"family": RunFolder(run).group.partition("-")[0]}
    columns |= {name: record["knobs"][name] for name in PAIR_KNOBS}
    facts = record["facts"]
    kinds = (facts["foreign"][kind] for kind in ("tags", "ends"))
    costs = [kind["cost"] for kind in kinds if kind]
    count = sum(cost["count"] for cost in costs)
    total_cost = sum(cost["count"] * cost["mean"] for cost in costs)
    measurements = {
        "foreign_share": facts["foreign"]["token_share"],
        "foreign_gap": total_cost / count if count else np.nan,
        "reverse_kl": facts["rollouts"]["divergence/reverse_kl"],
        "teacher_accuracy": facts["accuracy"]["teacher"]["accuracy"],
    }
    return columns | {name: round_significant(x, 4) for name, x in measurements.items()}


def gains(table: pd.DataFrame, regime: str, method: str) -> pd.DataFrame:
    """Compute the gain of every problem by a method: the last outcome minus the first.

    Args:
        table: A table with COLUMNS.
        regime: A group of it.
        method: A method.

    Returns:
        (pairs, problems) differences; empty if the method has no runs there.
    """
    columns = ["group", "method", "seed", "task", "step", "outcomes"]  # a copy of all takes long
    rows = table.loc[(table["group"] == regime) & (table["method"] == method), columns]
    if rows.empty:
        return pd.DataFrame()
    first = outcome_matrix(rows[rows["step"] == 0], method)
    return outcome_matrix(last_evaluations(rows), method) - first


def mean_interval(differences: pd.DataFrame) -> tuple[float, float, float]:
    """Return the mean of (pairs, problems) differences and its 95 % interval over both."""
    values = differences.to_numpy(float)
    return float(values.mean()), *gain_interval(values)


def paired_gains(of_method: pd.DataFrame, of_baseline: pd.DataFrame) -> pd.DataFrame:
    """Subtract the `gains` of a baseline from those of a method, over the pairs that both have."""
    pairs = of_method.index.intersection(of_baseline.index)
    if not len(pairs):
        return pd.DataFrame()
    return of_method.loc[pairs] - of_baseline.loc[pairs]


def summarize_regimes(
    table: pd.DataFrame, regimes: Sequence[str], methods: Sequence[str], baseline: str = ""
) -> pd.DataFrame:
    """Compute the gain of methods in regimes, or what they gain beyond a baseline.

    Args:
        table: A table with COLUMNS.
        regimes: Groups of it.
        methods: Methods.
        baseline: The method that they are compared with; "" for the students before training.

    Returns:
        One row a regime and method that has runs: regime, method, pairs, value, low, high, start,
        final (mean accuracies), collapsed (number of runs), and the means over pairs of PAIR_KNOBS
        and PAIR_MEASUREMENTS.
    """
    records = []
    names = [*PAIR_KNOBS, *PAIR_MEASUREMENTS]
    cells = dict(iter(table.groupby(["group", "method"])))  # comparing names of all rows takes long
    for regime in regimes:
        gained = {
            method: gains(cells[regime, method], regime, method)
            for method in dict.fromkeys([*methods, baseline])
            if (regime, method) in cells
        }
        for method in methods:
            if method not in gained or (baseline and baseline not in gained):
                continue
            differences = gained[method]
            if baseline:
                differences = paired_gains(differences, gained[baseline])
            if differences.empty:
                continue
            rows = cells[regime, method]
            rows = rows[rows["seed"].isin(differences.index)]
            value, low, high = mean_interval(differences)
            records.append(
                {"regime": regime, "method": method, "pairs": len(differences)}
                | {"value": value, "low": low, "high": high}
                | {"start": rows.loc[rows["step"] == 0, "accuracy"].mean()}
                | {"final": last_evaluations(rows)["accuracy"].mean()}
                | {"collapsed": len(collapsed_seeds(rows, method))}
                | rows[names].mean().to_dict()
            )
    if not records:
        raise InvalidInput(
            f"the table has no run of {', '.join(methods)} in {', '.join(regimes)}; make one with "
            "`opd map`, whose run folders are named REGIME/METHOD-SEED"
        )
    return pd.DataFrame(records)


def regimes_of(table: pd.DataFrame, *families: str) -> list[str]:
    """Return the regimes of families, in increasing order of their foreign tags.

    Args:
        table: A table with COLUMNS.
        *families: Families, such as "density".

    Returns:
        Names of regimes.
    """
    rows = table[table["family"].isin(families)].drop_duplicates("group")
    ordered = rows.sort_values(["foreign_tags", "tag_log_probability"], ascending=[True, False])
    return list(ordered["group"])
