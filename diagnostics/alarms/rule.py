"""A rule of an alarm: which column, which range, how sure, how long, and what to do then.

A rule watches one column. A reading of it counts as *outside* when it leaves the healthy range by
more than z of its standard errors (the column's "_se"; 0 where there is none, and no verdict where
it is not a number). An alarm is raised when `need` of the `last` readings were outside, and again
only after it has fallen silent. Rows that lack the column are no readings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diagnostics.errors import InvalidInput

Reading = tuple[float, float]
"""A value and its standard error."""


def rise(now: Reading, start: Reading) -> Reading:
    """now - start; the errors add in squares."""
    return now[0] - start[0], math.hypot(now[1], start[1])


def growth(now: Reading, start: Reading) -> Reading:
    """now / start with the linearised error; NaN where the start is not positive."""
    if not start[0] > 0:
        return math.nan, math.nan
    ratio = now[0] / start[0]
    return ratio, math.hypot(now[1], ratio * start[1]) / start[0]


def average(readings: Sequence[Reading]) -> Reading:
    """Mean of independent readings."""
    n = len(readings)
    return sum(x for x, _ in readings) / n, math.hypot(*(error for _, error in readings)) / n


def joined_z(readings: Sequence[Reading]) -> Reading:
    """One z of several: their sum over the square root of their number; its range is its error."""
    return sum(x for x, _ in readings) / math.sqrt(len(readings)), 0.0


@dataclass(frozen=True, kw_only=True)
class AlarmRule:
    """When a column says that something is wrong.

    name, metric: of the rule and of the column it watches.
    null: what the column reads when nothing is wrong, in words.
    low, high: the healthy range of what is tested; z: standard errors beyond it that count.
    need, last: an alarm needs `need` readings outside among the `last` ones.
    over, pool: what is tested is `pool` of the `over` latest readings.
    start, against: with `start` > 0 that many first readings only make a reference, their average,
      and what is tested is `against(pooled, reference)`; `rise` or `growth`.
    after: readings, the reference included, before the rule speaks.
    undefined: a reading that is not a number is itself outside; else it is no reading.
    means, remedy: for the person who reads the alarm.
    """

    name: str
    metric: str
    null: str
    means: str
    remedy: str
    low: float = -math.inf
    high: float = math.inf
    z: float = 4.0
    need: int = 3
    last: int = 5
    over: int = 1
    pool: Callable[[Sequence[Reading]], Reading] = average
    start: int = 0
    against: Callable[[Reading, Reading], Reading] = rise
    after: int = 0
    undefined: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.need <= self.last:
            raise InvalidInput(f"{self.name}: need is {self.need}, expected 1 to last, {self.last}")
        if self.over < 1 or self.start < 0 or self.z < 0:
            raise InvalidInput(f"{self.name}: over >= 1, start >= 0 and z >= 0 are expected")

    @property
    def tested(self) -> str:
        """What the range is about, in words."""
        found = self.metric
        if self.over > 1:
            how = "joined z" if self.pool is joined_z else "average"
            found = f"{how} of {self.over} {found}"
        if self.start:
            how = "over" if self.against is growth else "minus"
            found = f"{found} {how} its first {self.start}"
        return found

    @property
    def range(self) -> str:
        if self.undefined and self.low == -math.inf and self.high == math.inf:
            return "a number"
        if self.low == -math.inf:
            return f"up to {self.high:g}"
        return f"from {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"

    def outside(self, reading: Reading) -> bool:
        """The reading leaves the range by more than z standard errors."""
        value, error = reading
        margin = self.z * error
        return value - margin > self.high or value + margin < self.low
