"""What a run has shown, and what not: accuracy and divergence before and after, with intervals.

Silence of the alarms is no evidence of health: a run is "good" only where an interval of a change
for the better leaves out no change, none shows a change for the worse, and no alarm is on. Free of
torch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diagnostics.alarms.alarms import Alarms
from diagnostics.records.rows import Row
from diagnostics.stats import gain_interval, unpaired_interval

LEAST_PROBLEMS = 16
"""Held-out problems below which a change of accuracy is not called shown."""
LEAST_STEPS = 5
"""Steps at each end of a run over which the divergence is compared."""
SHARE = 10
"""The ends are a tenth of the steps where that is more."""
DIVERGENCES = (("divergence/reverse_kl", "reverse KL"), ("divergence/k1", "sampled cost"))
BETTER, WORSE, NOTHING = "better", "worse", "nothing shown"


@dataclass(frozen=True)
class Change:
    """A quantity before and after, the 95 % interval of the change, and what that shows.

    shown: BETTER, WORSE or NOTHING. basis: from what it was computed, or why it was not.
    """

    quantity: str
    task: str
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    shown: str
    basis: str

    def __str__(self) -> str:
        name = f"{self.quantity} of {self.task}" if self.task else self.quantity
        if self.change is None:
            return f"{name}: nothing shown ({self.basis})"
        return (
            f"{name}: {self.before:.3f} -> {self.after:.3f}, change {self.change:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}], {self.shown} ({self.basis})"
        )


def verdict(found: Sequence[Row], evaluations: Sequence[Row]) -> dict[str, Any]:
    """Of the rows and evaluations of a run: `state`, `text`, `changes`, `alarms`.

    state: "good", something for the better is shown and nothing for the worse, and no alarm is on;
    "bad", something for the worse is shown or an alarm is on; "open", nothing is shown.
    """
    tasks = list(dict.fromkeys(row.get("task", "") for row in [*found, *evaluations])) or [""]
    changes = [
        change
        for task in tasks
        for change in (
            accuracy_change([row for row in evaluations if row.get("task", "") == task], task),
            divergence_change([row for row in found if row.get("task", "") == task], task),
        )
    ]
    alarms = alarms_on(found)
    shown = {change.shown for change in changes}
    state = "bad" if alarms or WORSE in shown else "good" if BETTER in shown else "open"
    return {
        "state": state,
        "text": text(changes, alarms),
        "changes": [asdict(change) | {"sentence": str(change)} for change in changes],
        "alarms": alarms,
    }


def alarms_on(found: Sequence[Row]) -> list[str]:
    """Names of the alarms that are on after the last row; each task is watched by itself."""
    watching: dict[str, Alarms] = {}
    for row in found:
        watching.setdefault(row.get("task", ""), Alarms()).update(row)
    return sorted({name for alarms in watching.values() for name in alarms.active})


def text(changes: Sequence[Change], alarms: Sequence[str]) -> str:
    """One line: the alarms that are on, then what was shown."""
    on = f"alarms on: {', '.join(alarms)}; " if alarms else ""
    parts = []
    for change in changes:
        if change.shown == NOTHING or change.change is None:
            continue
        name = f"{change.quantity} of {change.task}" if change.task else change.quantity
        way = "up" if change.change > 0 else "down"
        size, ends = abs(change.change), sorted((abs(change.low or 0), abs(change.high or 0)))
        parts.append(f"{name} {way} by {size:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]")
    return on + ("shown: " + "; ".join(parts) if parts else "nothing shown")


def accuracy_change(evaluations: Sequence[Row], task: str = "") -> Change:
    """Held-out accuracy at the first and the last evaluation, paired by problem where it can be."""
    name = "held-out accuracy"
    graded = [row for row in evaluations if row.get("outcomes")]
    if len(graded) < 2:
        return unknown(name, task, f"{len(evaluations)} evaluations; two are needed")
    first, last = graded[0], graded[-1]
    before, after = shares(first["outcomes"]), shares(last["outcomes"])
    same = len(before) == len(after) and first.get("problem_set") == last.get("problem_set")
    if same:
        low, high = gain_interval(after - before)
        basis = f"{len(after)} problems, paired"
    else:
        low, high = unpaired_interval(before, after)
        basis = f"{len(before)} and {len(after)} other problems, not paired"
    few = min(len(before), len(after)) < LEAST_PROBLEMS
    if few:
        basis += f"; fewer than {LEAST_PROBLEMS} show nothing"
    shown = NOTHING if few or low <= 0 <= high else BETTER if low > 0 else WORSE
    was, now = float(before.mean()), float(after.mean())
    return Change(name, task, was, now, now - was, low, high, shown, basis)


def shares(outcomes: str) -> np.ndarray:
    """(M,) share of right responses to each problem; see `opd.evaluation.statistics.written`."""
    problems = outcomes.split() if " " in outcomes else list(outcomes)
    return np.array([sum(map(int, samples)) / len(samples) for samples in problems])


def divergence_change(found: Sequence[Row], task: str = "") -> Change:
    """The divergence from the teacher over the first and the last steps, with Welch's interval.

    The ends are of LEAST_STEPS steps, or a tenth of all. A step is the mean over its tokens and
    counts by their number; steps are the sampling unit, with prompts of their own.
    """
    for column, name in DIVERGENCES:
        points = [
            (float(row[column]), tokens(row))
            for row in found
            if isinstance(row.get(column), int | float) and math.isfinite(row[column])
        ]
        size = max(LEAST_STEPS, len(points) // SHARE)
        if len(points) >= 2 * size:
            first, last = np.array(points[:size]), np.array(points[-size:])
            (was, was_error), (now, now_error) = weighted(first), weighted(last)
            half = welch(was_error, now_error, size)
            low, high = now - was - half, now - was + half
            shown = NOTHING if low <= 0 <= high else BETTER if high < 0 else WORSE
            basis = f"first and last {size} steps, nats a token"
            return Change(name, task, was, now, now - was, low, high, shown, basis)
    basis = f"{len(found)} rows; {2 * LEAST_STEPS} with a divergence are needed"
    return unknown("divergence from the teacher", task, basis)


def unknown(quantity: str, task: str, basis: str) -> Change:
    return Change(quantity, task, None, None, None, None, None, NOTHING, basis)


def tokens(row: Row) -> float:
    """Supervised tokens of a step, from its position bins; 1 where they are not recorded."""
    counts = [x for name, x in row.items() if name.startswith("divergence/tokens@") and x]
    return float(sum(counts)) or 1.0


def weighted(points: np.ndarray) -> tuple[float, float]:
    """Mean of (n, 2) values with weights, and its standard error over steps."""
    values, weights = points.T
    mean = float((values * weights).sum() / weights.sum())
    n = len(values)
    squares = np.square(weights * (values - mean)).sum() * n / (n - 1)
    return mean, float(np.sqrt(squares) / weights.sum())


def welch(first: float, second: float, size: int) -> float:
    """Half the 95 % interval of a difference of two means of `size` values each."""
    from scipy.special import stdtrit

    variance = first**2 + second**2
    if variance == 0:
        return 0.0
    freedom = (size - 1) * variance**2 / (first**4 + second**4)
    return float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
