"""Alarm rules: the column, the healthy range, the significance, the persistence and the remedy.

A rule watches one column. A reading of it is *outside* when it leaves the healthy range by more
than z of its standard errors (the column's "_se"; 0 where there is none; no reading where it is not
a number). An alarm is raised when `min_outside` of the last `window` readings were outside, and
again only after it has become inactive. Rows that lack the column are not readings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diagnostics.errors import InvalidInput

Reading = tuple[float, float]
"""A value and its standard error."""


def rise(now: Reading, start: Reading) -> Reading:
    """Return now - start; the errors add in squares."""
    return now[0] - start[0], math.hypot(now[1], start[1])


def growth(now: Reading, start: Reading) -> Reading:
    """Return now / start with the linearised error; NaN where the start is not positive."""
    if not start[0] > 0:
        return math.nan, math.nan
    ratio = now[0] / start[0]
    return ratio, math.hypot(now[1], ratio * start[1]) / start[0]


def average(readings: Sequence[Reading]) -> Reading:
    """Return the mean of independent readings."""
    n = len(readings)
    return sum(x for x, _ in readings) / n, math.hypot(*(error for _, error in readings)) / n


def combined_z(readings: Sequence[Reading]) -> Reading:
    """Return the sum of several z over the square root of their number; its range is its error."""
    return sum(x for x, _ in readings) / math.sqrt(len(readings)), 0.0


@dataclass(frozen=True, kw_only=True)
class AlarmRule:
    """A condition on a column that indicates a fault."""

    name: str
    """Name of the rule."""
    metric: str
    """Column that the rule watches."""
    null: str
    """What the column reads in a healthy run, in words."""
    means: str
    """The fault, for the reader of the alarm."""
    remedy: str
    """What to do, for the reader of the alarm."""
    low: float = -math.inf
    """Lower end of the healthy range of the tested value."""
    high: float = math.inf
    """Upper end of the healthy range of the tested value."""
    z: float = 4.0
    """Standard errors beyond the range that count as outside."""
    min_outside: int = 3
    """Readings outside, among the last `window`, that raise the alarm."""
    window: int = 5
    """Number of last readings that are considered."""
    num_pooled: int = 1
    """The tested value is `pool` of this many latest readings."""
    pool: Callable[[Sequence[Reading]], Reading] = average
    """How readings are combined: `average` or `combined_z`."""
    num_reference: int = 0
    """If positive, the average of this many first readings is a reference, and the tested value
    is `compare(pooled, reference)`."""
    compare: Callable[[Reading, Reading], Reading] = rise
    """`rise` or `growth`."""
    min_readings: int = 0
    """Readings, the reference included, before the rule can raise an alarm."""
    nan_is_outside: bool = False
    """A reading that is not a number is outside; otherwise it is not a reading."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_outside <= self.window:
            raise InvalidInput(
                f"{self.name}: min_outside is {self.min_outside}; it must be between 1 and "
                f"window={self.window}"
            )
        if self.num_pooled < 1 or self.num_reference < 0 or self.z < 0:
            raise InvalidInput(
                f"{self.name}: num_pooled >= 1, num_reference >= 0 and z >= 0 are required; got "
                f"{self.num_pooled}, {self.num_reference} and {self.z:g}"
            )

    @property
    def tested(self) -> str:
        """The tested value, in words."""
        description = self.metric
        if self.num_pooled > 1:
            operation = "combined z" if self.pool is combined_z else "average"
            description = f"{operation} of {self.num_pooled} {description}"
        if self.num_reference:
            operation = "over" if self.compare is growth else "minus"
            description = f"{description} {operation} its first {self.num_reference}"
        return description

    @property
    def range(self) -> str:
        """The healthy range, in words."""
        if self.nan_is_outside and self.low == -math.inf and self.high == math.inf:
            return "a number"
        if self.low == -math.inf:
            return f"up to {self.high:g}"
        return f"from {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"

    def outside(self, reading: Reading) -> bool:
        """Return whether the reading leaves the range by more than z standard errors."""
        value, error = reading
        margin = self.z * error
        return value - margin > self.high or value + margin < self.low
