"""What a part of the command reports."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.gpu.setting import Setting


@dataclass(frozen=True)
class Check:
    """A number that must not exceed a limit."""

    subject: str
    deviation: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is within the limit; NaN is not."""
        return self.deviation <= self.limit


def fact(subject: str, holds: bool, note: str = "") -> Check:
    """Return the check of a statement that must be true."""
    return Check(subject, float(not holds), 0, note)


@dataclass(frozen=True)
class Measurement:
    """A time or a rate, with its ratio to something measured beside it."""

    subject: str
    value: float
    unit: str
    mebibytes: float | None = None
    """Extra peak memory."""
    ratio: float | None = None
    reference: str = ""
    """What the ratio compares with."""
    note: str = ""


@dataclass(frozen=True)
class Omission:
    """Something that was not run, and why."""

    subject: str
    reason: str


Row = Check | Measurement | Omission


class SkipPart(Exception):
    """Raised by a part that cannot run on this machine, with the reason."""


@dataclass(frozen=True)
class Part:
    """A proof or a set of measurements; parts are run in the order of their priority."""

    name: str
    kind: Literal["proof", "measurement"]
    seconds: float
    """Expected time on a GPU, compilation included."""
    run: Callable[[Setting], Iterator[Row]]


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    kind: str
    status: Literal["ok", "failed", "error", "skipped"]
    seconds: float = 0.0
    reason: str = ""
    """Why it was skipped, or the last line of the traceback."""
    traceback: str = ""
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome for results.json."""
        rows = [
            {"kind": type(row).__name__.lower(), **asdict(row)}
            | ({"passed": row.passed} if isinstance(row, Check) else {})
            for row in self.rows
        ]
        return {**vars(self), "rows": rows}
