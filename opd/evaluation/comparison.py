"""Paired comparison of two evaluations in all that both have measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput
from opd.evaluation.measures import BY_PROBLEM
from opd.evaluation.statistics import compare, mean_interval, ratio_values

TOTALS_BY_PROBLEM = {
    f"calibration/{BY_PROBLEM}": "calibration/over_confidence",
    f"recovery/{BY_PROBLEM}": "recovery/loss",
}
"""Results with a sum and a count per problem, and the ratio of their totals."""


def compare_results(baseline: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, float]:
    """Return how an evaluation differs from an earlier one on the same problems.

    Args:
        baseline: Results of the earlier model, such as a file of `opd eval --out`.
        result: Results of the later model.

    Returns:
        `compare` of the task; of the other task as `other/NAME`, whose negative `gain` is what was
        forgotten; and the changes of `calibration/over_confidence` and `recovery/loss`, each with a
        paired interval over problems.

    Raises:
        InvalidInput: The problems differ, or the earlier evaluation lacks the other task.
    """
    comparison = compare(dict(baseline), dict(result))
    if "other/outcomes" in result:
        if "other/outcomes" not in baseline:
            raise InvalidInput(
                "the evaluation to compare with has no other task; repeat it with the same "
                "--other-task, or leave --other-task out"
            )
        parts = [
            {name.removeprefix("other/"): x for name, x in results.items() if is_other(name)}
            for results in (baseline, result)
        ]
        try:
            comparison |= with_prefix("other", compare(*parts))
        except InvalidInput as error:
            raise InvalidInput(f"other task: {error}") from error
    for totals, name in TOTALS_BY_PROBLEM.items():
        if totals in baseline and totals in result:
            comparison |= with_prefix(name, change_of_ratio(baseline[totals], result[totals]))
    return comparison


def is_other(name: str) -> bool:
    """Return whether a result is one of the other task."""
    return name.startswith("other/")


def change_of_ratio(baseline: Any, result: Any) -> dict[str, float]:
    """Return the change of a ratio of totals, paired by problem.

    Args:
        baseline: (M, 2) sum and count of each problem.
        result: The same of the later model.

    Returns:
        `change`, `low`, `high`; empty where one of them counts nothing.
    """
    tables = [np.asarray(totals, dtype=float).reshape(-1, 2) for totals in (baseline, result)]
    if not all(table[:, 1].any() for table in tables):
        return {}
    values = ratio_values(*tables[1].T) - ratio_values(*tables[0].T)
    low, high = mean_interval(values, -2.0, 2.0)
    return {"change": float(values.mean()), "low": low, "high": high}


def with_prefix(prefix: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return results under the names PREFIX/NAME."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
