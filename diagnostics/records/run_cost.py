"""What a run has cost: tokens that the models sampled and scored, and seconds of its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diagnostics.records.rows import Row
from diagnostics.records.run_folder import RunFolder

SECONDS, COST = "seconds/", "cost/"


def step_seconds(row: Row) -> float:
    """Return the seconds of a step: rollouts, scores, update and record, without evaluations."""
    return sum(value for name, value in row.items() if name.startswith(SECONDS) and value)


def response_tokens(row: Row) -> float:
    """Return the response tokens of a step, whoever wrote them."""
    return float(row["machine/tokens_per_second"] * step_seconds(row))


def run_cost(folder: str | Path) -> dict[str, float]:
    """Add up what the steps of a run have cost.

    Steps that a resumed run repeated count once, and evaluations, checkpoints and the start not at
    all. The seconds are those of the clock, not of every device.

    Args:
        folder: A run folder.

    Returns:
        `cost/steps`, `cost/response_tokens`, `cost/seconds`, `cost/seconds/PART` and, where the
        rows have them, `cost/student_tokens`, `cost/teacher_sampled_tokens` and
        `cost/teacher_tokens` (`diagnostics.records.row_columns`).

    Raises:
        MissingFile: It is not a run folder.
    """
    return total_cost(RunFolder(Path(folder)).rows())


def total_cost(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return `run_cost` of the rows of a run, of `opd train` or of a monitor."""
    cost = {"cost/steps": float(len({row["step"] for row in rows}))}
    timed = [dict(row) for row in rows if "machine/tokens_per_second" in row]
    if timed:
        cost["cost/response_tokens"] = float(round(sum(map(response_tokens, timed))))
        cost["cost/seconds"] = sum(map(step_seconds, timed))
    for row in rows:
        for name, value in row.items():
            if name.startswith(SECONDS):
                cost[COST + name] = cost.get(COST + name, 0.0) + (value or 0.0)
    for name in sorted({name for row in rows for name in row if name.startswith(COST)}):
        if all(name in row for row in rows):  # a run that an older version began lacks some
            cost[name] = float(sum(row[name] for row in rows))
    return cost
