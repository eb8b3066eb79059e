"""The result of a run: change of accuracy and divergence, with confidence intervals.

The absence of alarms is not evidence of success: a run is "good" only if the confidence interval of
an improvement excludes 0, no interval shows a deterioration, and no alarm is active. Does not
import torch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diagnostics.alarms.alarms import Alarms
from diagnostics.alarms.rule import AlarmRule
from diagnostics.records.rows import Row
from diagnostics.records.run_folder import RunFolder
from diagnostics.stats import (
    gain_interval,
    problem_accuracies,
    t_critical,
    unpaired_interval,
)
from opd.config.prefixes import ON_POLICY, Prefixes
from opd.runs.alarm_rules import TEACHER_FREE, recorded_prefixes, rules_of

MIN_PROBLEMS = 16
"""Smallest number of held-out problems for a conclusion about accuracy."""
MIN_STEPS = 5
"""Smallest number of steps at each end of a run over which the divergence is averaged."""
SEGMENT_DIVISOR = 10
"""Each end is a tenth of the steps if that is more."""
DIVERGENCES = (("divergence/reverse_kl", "reverse KL"), ("divergence/k1", "sampled cost"))
BETTER, WORSE, INCONCLUSIVE = "better", "worse", "nothing shown"


@dataclass(frozen=True)
class Change:
    """A quantity before and after training, with the 95 % confidence interval of its change."""

    quantity: str
    """Name of the quantity."""
    task: str
    """Name of the task; empty in a run of a single task."""
    before: float | None
    """Value at the start; None if it could not be computed."""
    after: float | None
    """Value at the end."""
    change: float | None
    low: float | None
    """Lower end of the interval."""
    high: float | None
    """Upper end of the interval."""
    shown: str
    """Conclusion: BETTER, WORSE or INCONCLUSIVE."""
    basis: str
    """Data that the change was computed from, or why it was not computed."""

    def __str__(self) -> str:
        name = f"{self.quantity} of {self.task}" if self.task else self.quantity
        if self.change is None:
            return f"{name}: not measured ({self.basis})"
        return (
            f"{name}: {self.before:.3f} -> {self.after:.3f}, change {self.change:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}], {self.shown} ({self.basis})"
        )


def run_verdict(run: RunFolder) -> dict[str, Any]:
    """Judge a run by its record; see `verdict`."""
    settings = run.settings()
    objective = str(settings.get("objective", ""))
    return verdict(run.rows(), run.evaluations({}), recorded_prefixes(settings), objective)


def verdict(
    rows: Sequence[Row],
    evaluations: Sequence[Row],
    prefixes: Prefixes = ON_POLICY,
    objective: str = "",
) -> dict[str, Any]:
    """Judge a run by its rows and evaluations.

    Args:
        rows: Rows of the run.
        evaluations: Rows of evals.jsonl.
        prefixes: Who wrote the responses.
        objective: Name of the objective; "" if it is not known.

    Returns:
        `state`, `text`, `changes` and `alarms`. The state is "good" if there is an improvement, no
        deterioration and no active alarm; "bad" if there is a deterioration or an active alarm;
        "open" otherwise.
    """
    tasks = list(dict.fromkeys(row.get("task", "") for row in [*rows, *evaluations])) or [""]
    changes = [
        change
        for task in tasks
        for change in (
            accuracy_change([row for row in evaluations if row.get("task", "") == task], task),
            divergence_change(
                [row for row in rows if row.get("task", "") == task], task, prefixes, objective
            ),
        )
    ]
    alarms = active_alarms(rows, rules_of(prefixes, objective))
    outcomes = {change.shown for change in changes}
    state = "bad" if alarms or WORSE in outcomes else "good" if BETTER in outcomes else "open"
    return {
        "state": state,
        "text": summary_line(changes, alarms),
        "changes": [asdict(change) | {"sentence": str(change)} for change in changes],
        "alarms": alarms,
    }


def active_alarms(rows: Sequence[Row], rules: Sequence[AlarmRule]) -> list[str]:
    """Return the alarms that are active after the last row, monitoring each task separately."""
    alarms_by_task: dict[str, Alarms] = {}
    for row in rows:
        alarms_by_task.setdefault(row.get("task", ""), Alarms(rules)).update(row)
    return sorted({name for alarms in alarms_by_task.values() for name in alarms.active})


def summary_line(changes: Sequence[Change], alarms: Sequence[str]) -> str:
    """Format active alarms and significant changes on one line."""
    prefix = f"active alarms: {', '.join(alarms)}; " if alarms else ""
    parts = []
    for change in changes:
        if change.shown == INCONCLUSIVE or change.change is None:
            continue
        name = f"{change.quantity} of {change.task}" if change.task else change.quantity
        direction = "up" if change.change > 0 else "down"
        size, bounds = abs(change.change), sorted((abs(change.low or 0), abs(change.high or 0)))
        parts.append(f"{name} {direction} by {size:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]")
    return prefix + (
        "significant changes: " + "; ".join(parts) if parts else "no significant change"
    )


def accuracy_change(evaluations: Sequence[Row], task: str = "") -> Change:
    """Compare held-out accuracy at the first and last evaluation, paired by problem if possible.

    Args:
        evaluations: Rows of evals.jsonl of one task.
        task: Name of the task.

    Returns:
        The change.
    """
    name = "held-out accuracy"
    graded = [row for row in evaluations if row.get("outcomes")]
    if len(graded) < 2:
        return no_change_measured(name, task, f"{len(evaluations)} evaluations; two are required")
    first, last = graded[0], graded[-1]
    first_accuracy, last_accuracy = (
        problem_accuracies(first["outcomes"]),
        problem_accuracies(last["outcomes"]),
    )
    is_paired = len(first_accuracy) == len(last_accuracy) and first.get("problem_set") == last.get(
        "problem_set"
    )
    if is_paired:
        low, high = gain_interval(last_accuracy - first_accuracy)
        basis = f"{len(last_accuracy)} problems, paired"
    else:
        low, high = unpaired_interval(first_accuracy, last_accuracy)
        basis = f"{len(first_accuracy)} and {len(last_accuracy)} different problems, not paired"
    has_few_problems = min(len(first_accuracy), len(last_accuracy)) < MIN_PROBLEMS
    if has_few_problems:
        basis += f"; at least {MIN_PROBLEMS} are required"
    outcome = INCONCLUSIVE if has_few_problems or low <= 0 <= high else BETTER if low > 0 else WORSE
    first_mean, last_mean = float(first_accuracy.mean()), float(last_accuracy.mean())
    return Change(
        name, task, first_mean, last_mean, last_mean - first_mean, low, high, outcome, basis
    )


def divergence_change(
    rows: Sequence[Row], task: str = "", prefixes: Prefixes = ON_POLICY, objective: str = ""
) -> Change:
    """Compare the divergence in the first and last steps, with Welch's confidence interval.

    Each end has MIN_STEPS steps, or a tenth of all if that is more. A step's value is the mean over
    its tokens and is weighted by their number; steps are the sampling unit, each with its own
    prompts. Not measured are the sampled cost on responses that others wrote, where it is no
    divergence, and any change while the share of the student's own responses changes. An objective
    without a teacher minimises no divergence, and a change of it is neither better nor worse.

    Args:
        rows: Rows of one task.
        task: Name of the task.
        prefixes: Who wrote the responses.
        objective: Name of the objective.

    Returns:
        The change.
    """
    if prefixes.is_changing:
        basis = "the steps have different shares of the student's own responses"
        return no_change_measured("divergence from the teacher", task, basis)
    for column, name in DIVERGENCES:
        if prefixes.partner and column == "divergence/k1":
            continue
        points = [
            (float(row[column]), count_tokens(row))
            for row in rows
            if isinstance(row.get(column), int | float) and math.isfinite(row[column])
        ]
        size = max(MIN_STEPS, len(points) // SEGMENT_DIVISOR)
        if len(points) >= 2 * size:
            first, last = np.array(points[:size]), np.array(points[-size:])
            (first_mean, first_error), (last_mean, last_error) = (
                weighted_mean_and_error(first),
                weighted_mean_and_error(last),
            )
            half_width = welch_half_width(first_error, last_error, size)
            low, high = last_mean - first_mean - half_width, last_mean - first_mean + half_width
            outcome = INCONCLUSIVE if low <= 0 <= high else BETTER if high < 0 else WORSE
            basis = f"first and last {size} steps, nats per token"
            if objective in TEACHER_FREE:
                outcome, basis = INCONCLUSIVE, f"{basis}; {objective} does not minimise it"
            return Change(
                name, task, first_mean, last_mean, last_mean - first_mean, low, high, outcome, basis
            )
    basis = f"{len(rows)} rows; {2 * MIN_STEPS} with a divergence are required"
    return no_change_measured("divergence from the teacher", task, basis)


def no_change_measured(quantity: str, task: str, basis: str) -> Change:
    """Return a change without values; `basis` says why it could not be measured."""
    return Change(quantity, task, None, None, None, None, None, INCONCLUSIVE, basis)


def count_tokens(row: Row) -> float:
    """Return the supervised tokens of a step, summed over position bins; 1 if not recorded."""
    counts = [x for name, x in row.items() if name.startswith("divergence/tokens@") and x]
    return float(sum(counts)) or 1.0


def weighted_mean_and_error(points: np.ndarray) -> tuple[float, float]:
    """Return the weighted mean of (n, 2) values with weights, and its standard error over steps."""
    values, weights = points.T
    mean = float((values * weights).sum() / weights.sum())
    n = len(values)
    squares = np.square(weights * (values - mean)).sum() * n / (n - 1)
    return mean, float(np.sqrt(squares) / weights.sum())


def welch_half_width(first: float, second: float, size: int) -> float:
    """Return half the width of the 95 % interval of a difference of two means.

    Args:
        first: Standard error of the first mean.
        second: Standard error of the second mean.
        size: Number of values of each mean.

    Returns:
        Half the width, from Student's t with Welch's degrees of freedom.
    """
    variance = first**2 + second**2
    if variance == 0:
        return 0.0
    degrees_of_freedom = (size - 1) * variance**2 / (first**4 + second**4)
    return t_critical(degrees_of_freedom) * math.sqrt(variance)
