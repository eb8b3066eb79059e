"""Alarms: rules over the rows of a run, live or from its record, and their lead times.

Free of torch: `replay` reads the rows of any run folder.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diagnostics.alarms.rules import RULES, AlarmRule, Reading, average
from diagnostics.errors import InvalidInput
from diagnostics.records.rows import Row


@dataclass(frozen=True)
class Alarm:
    """An alarm that was raised at a step."""

    rule: AlarmRule
    """The rule."""
    step: int
    """Step of the row."""
    value: float
    """The tested value."""
    error: float
    """Standard error of the tested value."""

    def __str__(self) -> str:
        rule, error = self.rule, f" ± {self.error:.2g}" if self.error > 0 else ""
        return (
            f"step {self.step}, {rule.name}: {rule.means} ({rule.tested} is {self.value:.3g}"
            f"{error}, healthy {rule.range}). To do: {rule.remedy}."
        )


@dataclass
class _RuleState:
    """Readings of a rule; plain lists and numbers."""

    num_readings: int = 0
    reference: list[Reading] = field(default_factory=list)
    recent: list[Reading] = field(default_factory=list)
    outside: list[bool] = field(default_factory=list)
    active: bool = False


class Alarms:
    """The rules and their state; `update` is the same for live rows and rows of a file."""

    def __init__(self, rules: Sequence[AlarmRule] = RULES) -> None:
        self.rules = {rule.name: rule for rule in rules}
        if len(self.rules) != len(rules):
            raise InvalidInput(f"rule names must be unique: {sorted(rule.name for rule in rules)}")
        self.active: dict[str, Alarm] = {}
        """Rule name to the active alarm."""
        self._states = {name: _RuleState() for name in self.rules}

    def update(self, row: Row) -> list[Alarm]:
        """Return the alarms that a row raises.

        Args:
            row: "step" and any columns.

        Returns:
            The alarms that this row raises.

        Raises:
            InvalidInput: The row has no "step".
        """
        if "step" not in row:
            raise InvalidInput('the row has no column "step", which alarms require')
        raised = []
        for name, rule in self.rules.items():
            if rule.metric not in row:
                continue
            state = self._states[name]
            tested = _evaluate(rule, state, _reading(row, rule.metric))
            was_active, state.active = state.active, sum(state.outside) >= rule.min_outside
            if state.active and not was_active and tested is not None:
                self.active[name] = Alarm(rule, int(row["step"]), *tested)
                raised.append(self.active[name])
            if not state.active:
                self.active.pop(name, None)
        return raised

    @property
    def unwatched(self) -> list[str]:
        """Names of the rules whose column was in no row; they cannot raise an alarm."""
        return [name for name, state in self._states.items() if not state.num_readings]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all rules, as JSON-serialisable values."""
        watches = {
            name: {
                "seen": state.num_readings,
                "first": state.reference,
                "recent": state.recent,
                "outside": state.outside,
                "on": state.active,
            }
            for name, state in self._states.items()
        }
        active = {name: [a.step, a.value, a.error] for name, a in self.active.items()}
        return {"watches": watches, "active": active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; rules that are not in it start without readings."""
        for name, saved in state["watches"].items():
            if name in self.rules:
                self._states[name] = _RuleState(
                    num_readings=saved["seen"],
                    reference=[(x, error) for x, error in saved["first"]],
                    recent=[(x, error) for x, error in saved["recent"]],
                    outside=list(saved["outside"]),
                    active=saved["on"],
                )
        self.active = {
            name: Alarm(self.rules[name], *saved)
            for name, saved in state["active"].items()
            if name in self.rules
        }


def _reading(row: Row, metric: str) -> Reading:
    """Return the column and its error; null, as in files, is NaN."""
    value, error = row[metric], row.get(metric + "_se", 0.0)
    return (math.nan if value is None else float(value)), (
        math.nan if error is None else float(error)
    )


def _evaluate(rule: AlarmRule, state: _RuleState, reading: Reading) -> Reading | None:
    """Add a reading to the state; return the tested value, or None if there is none."""
    if not math.isfinite(reading[0]) or math.isnan(reading[1]):
        state.num_readings += 1
        if rule.nan_is_outside and not math.isfinite(reading[0]):
            state.outside = [*state.outside, True][-rule.window :]
            return reading[0], 0.0
        return None
    state.num_readings += 1
    if len(state.reference) < rule.num_reference:
        state.reference = [*state.reference, reading]
        return None
    state.recent = [*state.recent, reading][-rule.num_pooled :]
    tested = rule.pool(state.recent)
    if rule.num_reference:
        tested = rule.compare(tested, average(state.reference))
    if state.num_readings > rule.min_readings:
        state.outside = [*state.outside, rule.outside(tested)][-rule.window :]
    return tested


def replay(rows: Iterable[Row], rules: Sequence[AlarmRule] = RULES) -> list[Alarm]:
    """Return every alarm that a record raises, in order.

    If several rows have the same step, the last one counts. Alternating tasks (rows with "task")
    are watched separately: a curve that jumps from task to task is not a drift.

    Args:
        rows: Rows of a run.
        rules: Rules to apply.

    Returns:
        The alarms by step.
    """
    by_step = {row["step"]: row for row in rows}
    task_alarms: dict[str, Alarms] = {}
    raised: list[Alarm] = []
    for step in sorted(by_step):
        row = by_step[step]
        raised += task_alarms.setdefault(row.get("task", ""), Alarms(rules)).update(row)
    return raised


def lead_times(alarms: Iterable[Alarm], step: int) -> dict[str, int]:
    """Return the steps from each rule's first alarm to a later collapse.

    Args:
        alarms: Alarms of a run.
        step: Step of the collapse.

    Returns:
        Rule name to the number of steps, for rules that raised an alarm before `step`.
    """
    steps: dict[str, int] = {}
    for alarm in sorted(alarms, key=lambda a: a.step):
        if alarm.step < step:
            steps.setdefault(alarm.rule.name, step - alarm.step)
    return steps
