"""Alarms: rules over the rows of a run, live or from its record, and how early they spoke.

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
    """A rule that was broken at a step; value and error are those of what the rule tests."""

    rule: AlarmRule
    step: int
    value: float
    error: float

    def __str__(self) -> str:
        rule, error = self.rule, f" ± {self.error:.2g}" if self.error > 0 else ""
        return (
            f"step {self.step}, {rule.name}: {rule.means} ({rule.tested} is {self.value:.3g}"
            f"{error}, healthy {rule.range}). To do: {rule.remedy}."
        )


@dataclass
class _Watch:
    """What a rule remembers; plain lists and numbers."""

    seen: int = 0
    first: list[Reading] = field(default_factory=list)
    recent: list[Reading] = field(default_factory=list)
    outside: list[bool] = field(default_factory=list)
    on: bool = False


class Alarms:
    """The rules with their memory. `update` is the same whether rows come live or from a file.

    active: rule name to the alarm that is on.
    """

    def __init__(self, rules: Sequence[AlarmRule] = RULES) -> None:
        self.rules = {rule.name: rule for rule in rules}
        if len(self.rules) != len(rules):
            raise InvalidInput(f"rules share a name: {sorted(rule.name for rule in rules)}")
        self.active: dict[str, Alarm] = {}
        self._watches = {name: _Watch() for name in self.rules}

    def update(self, row: Row) -> list[Alarm]:
        """Alarms that this row raises; it holds "step" and any columns.

        Raises:
          ValueError: the row has no "step".
        """
        if "step" not in row:
            raise InvalidInput('the row has no "step"; alarms are told by step')
        raised = []
        for name, rule in self.rules.items():
            if rule.metric not in row:
                continue
            watch = self._watches[name]
            found = _observe(rule, watch, _reading(row, rule.metric))
            was, watch.on = watch.on, sum(watch.outside) >= rule.need
            if watch.on and not was and found is not None:
                self.active[name] = Alarm(rule, int(row["step"]), *found)
                raised.append(self.active[name])
            if not watch.on:
                self.active.pop(name, None)
        return raised

    @property
    def unwatched(self) -> list[str]:
        """Names of the rules whose column no row has held: their silence says nothing."""
        return [name for name, watch in self._watches.items() if not watch.seen]

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, fit for JSON."""
        watches = {name: vars(watch).copy() for name, watch in self._watches.items()}
        active = {name: [a.step, a.value, a.error] for name, a in self.active.items()}
        return {"watches": watches, "active": active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; rules that it does not know start afresh."""
        for name, saved in state["watches"].items():
            if name in self.rules:
                self._watches[name] = _Watch(
                    seen=saved["seen"],
                    first=[(x, error) for x, error in saved["first"]],
                    recent=[(x, error) for x, error in saved["recent"]],
                    outside=list(saved["outside"]),
                    on=saved["on"],
                )
        self.active = {
            name: Alarm(self.rules[name], *saved)
            for name, saved in state["active"].items()
            if name in self.rules
        }


def _reading(row: Row, metric: str) -> Reading:
    """The column and its error; null, as files have it, is NaN."""
    value, error = row[metric], row.get(metric + "_se", 0.0)
    return (math.nan if value is None else float(value)), (
        math.nan if error is None else float(error)
    )


def _observe(rule: AlarmRule, watch: _Watch, now: Reading) -> Reading | None:
    """Remember a reading; what was tested, or None if there was nothing to test."""
    if not math.isfinite(now[0]) or math.isnan(now[1]):
        watch.seen += 1
        if rule.undefined and not math.isfinite(now[0]):
            watch.outside = [*watch.outside, True][-rule.last :]
            return now[0], 0.0
        return None
    watch.seen += 1
    if len(watch.first) < rule.start:
        watch.first = [*watch.first, now]
        return None
    watch.recent = [*watch.recent, now][-rule.over :]
    tested = rule.pool(watch.recent)
    if rule.start:
        tested = rule.against(tested, average(watch.first))
    if watch.seen > rule.after:
        watch.outside = [*watch.outside, rule.outside(tested)][-rule.last :]
    return tested


def replay(rows: Iterable[Row], rules: Sequence[AlarmRule] = RULES) -> list[Alarm]:
    """Every alarm that a record raises, in order; of rows with one step the last counts.

    Tasks that take turns, rows with "task", are watched one by one: a curve that jumps from task to
    task is no drift.
    """
    by_step = {row["step"]: row for row in rows}
    watching: dict[str, Alarms] = {}
    raised: list[Alarm] = []
    for step in sorted(by_step):
        row = by_step[step]
        raised += watching.setdefault(row.get("task", ""), Alarms(rules)).update(row)
    return raised


def lead_times(alarms: Iterable[Alarm], step: int) -> dict[str, int]:
    """AlarmRule name to the steps from its first alarm to `step`, that of a collapse, if before it."""
    found: dict[str, int] = {}
    for alarm in sorted(alarms, key=lambda a: a.step):
        if alarm.step < step:
            found.setdefault(alarm.rule.name, step - alarm.step)
    return found
