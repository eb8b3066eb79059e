"""The record of a run as plain data for the page: curves, alarms, accuracy, positions, settings.

Does not import torch. A run with several tasks has one part per task, with separate curves.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.alarms.alarms import Alarms
from diagnostics.alarms.rules import RULES, AlarmRule
from diagnostics.errors import InvalidInput
from diagnostics.io.files import has_type, short_repr
from diagnostics.records.rows import POSITION_BIN, Row
from diagnostics.records.run_folder import RunFolder
from diagnostics.stats import round_significant
from opd.runs.alarm_rules import recorded_prefixes, rules_of
from opd.runs.restart import start_history
from opd.runs.result import verdict

OUTCOMES = re.compile(r"[01]+(?: [01]+)*")
MAX_POINTS, MAX_MAP_STEPS = 1600, 480
"""Largest number of points of a curve and of steps of a heat map, over all runs of a page."""
MAX_CODE_LENGTH = 40_000
"""Largest number of characters of code.txt that are shown."""
BREAKDOWN_METRICS = ("divergence/kl_binary", "divergence/kl_head", "divergence/kl_tail")
Point = tuple[Any, ...]
Bins = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class RunRecord:
    """The record of a run: folder, settings, code state, rows and evaluations."""

    folder: RunFolder
    config: dict[str, Any]
    code: str
    rows: list[Row]
    evals: Sequence[Row]
    notes: tuple[str, ...] = ()
    """Notes on parts of the record that were skipped."""
    models: bool = False
    """Whether files outside the run folder may be read because the record refers to them."""


def may_read(run: RunRecord, path: Path) -> bool:
    """Return whether a path may be read: it is inside the run folder, or `models` allows it.

    Symbolic links are resolved. A record may come from somebody else: paths that it names or links
    to outside are not read.

    Args:
        run: The run.
        path: A file or folder.

    Returns:
        Whether the path may be read.
    """
    return run.models or path.resolve().is_relative_to(run.folder.path.resolve())


def read_run(path: Path, models: bool = False) -> RunRecord:
    """Read the record of a run folder, finished or not; a single file of rows is enough.

    Args:
        path: The run folder.
        models: See `RunRecord.models`.

    Returns:
        The record.

    Raises:
        InvalidInput: A file of the record is a link that leads out of the folder, or is damaged.
        MissingFile: It is not a run folder.
    """
    folder = RunFolder(path)
    code, files = path / "code.txt", (folder.rows_file, folder.evaluations_file)
    for file in (path / "config.json", code, *files, folder.starts_file):
        if not models and not file.resolve().is_relative_to(path.resolve()):
            raise InvalidInput(
                f"{file} is a link to {file.resolve()}, outside the run folder: copy the file "
                "there, or allow links with --models"
            )
    code_text = code.read_text("utf-8", "replace") if code.exists() else "unknown: no code.txt"
    return RunRecord(
        folder=folder,
        config=folder.settings(),
        code="\n".join([*start_history(folder), code_text]),
        rows=deduplicate_steps(check_metric_values(folder.rows(), folder.rows_file)),
        evals=check_evaluations(folder.evaluations({"step": int}), folder.evaluations_file),
        notes=tuple(note for file in files for note in truncation_notes(file)),
        models=models,
    )


def check_evaluations(rows_to_check: Sequence[Row], path: Path) -> Sequence[Row]:
    """Check the rows of evaluations: `check_metric_values`, and outcomes that fit their problems.

    Args:
        rows_to_check: The rows.
        path: The file, for messages.

    Returns:
        The rows.

    Raises:
        InvalidInput: The message contains the row, the field and the value.
    """
    for i, row in enumerate(check_metric_values(rows_to_check, path), 1):
        outcomes = row.get("outcomes", "0")
        checks = {
            "accuracy": lambda x: x is None or (has_type(x, float) and 0 <= x <= 1),
            "length": lambda x: x is None or (has_type(x, float) and x >= 0),
            "problems": lambda x: has_type(x, int) and x >= 1,
            "outcomes": lambda x: isinstance(x, str) and OUTCOMES.fullmatch(x) is not None,
        }
        for name, is_valid in checks.items():
            if name in row and not is_valid(row[name]):
                raise InvalidInput(
                    f"{path} row {i}, field {name}: {short_repr(row[name])} is not a valid value; "
                    "correct or remove the row"
                )
        count = len(outcomes.split()) if " " in outcomes else row.get("problems", 1)
        if "outcomes" in row and len(outcomes.replace(" ", "")) % count:
            raise InvalidInput(
                f"{path} row {i}, field outcomes: {short_repr(outcomes)} does not fit {count} "
                "problems"
            )
    return rows_to_check


def check_metric_values(rows_to_check: Sequence[Row], path: Path) -> Sequence[Row]:
    """Check that metrics are numbers or null and that the task is text.

    Args:
        rows_to_check: The rows.
        path: The file, for messages.

    Returns:
        The rows.

    Raises:
        InvalidInput: The message contains the row, the field and the value.
    """
    alarm_metrics = {rule.metric for rule in Alarms().rules.values()}
    for i, row in enumerate(rows_to_check, 1):
        for name, value in row.items():
            is_metric = "/" in name or name.removesuffix("_se") in alarm_metrics
            is_number = value is None or has_type(value, float)
            if (is_metric and not is_number) or (name == "task" and not isinstance(value, str)):
                expected = "a number or null" if is_metric else "text"
                raise InvalidInput(
                    f"{path} row {i}, field {name}: {short_repr(value)} is not {expected}; correct "
                    "or remove the row"
                )
    return rows_to_check


def truncation_notes(path: Path) -> list[str]:
    """Return a note if the last line of a file of rows is truncated; such a line is skipped."""
    text = path.read_text("utf-8", "replace") if path.exists() else ""
    lines = text.removesuffix("\n").split("\n")
    try:
        json.loads(lines[-1] or "{}")
    except ValueError:
        return [f"{path.name} line {len(lines)} is truncated and was skipped"]
    return []


def deduplicate_steps(rows_in_order: Iterable[Row]) -> list[Row]:
    """Return rows by rising step; of several rows with one step the last is kept."""
    by_step = {row["step"]: row for row in rows_in_order}
    return [by_step[step] for step in sorted(by_step)]


def run_page_data(run: RunRecord, runs: int = 1) -> dict[str, Any]:
    """Collect what the page shows of one run's record.

    Args:
        run: The run.
        runs: Number of runs on the page, which limits the size of each.

    Returns:
        The data.
    """
    tasks = list(dict.fromkeys(row.get("task", "") for row in run.rows)) or [""]
    seconds = sum(v or 0 for row in run.rows for k, v in row.items() if k.startswith("seconds/"))
    code, prefixes = run.code.strip(), recorded_prefixes(run.config)
    objective = str(run.config.get("objective", ""))
    return {
        "name": run.folder.name,
        "folder": str(run.folder.path),
        "config": run.config,
        "code": code[:MAX_CODE_LENGTH] + ("\n… (truncated)" if len(code) > MAX_CODE_LENGTH else ""),
        "done": run.rows[-1]["step"] + 1 if run.rows else 0,
        "seconds": round(seconds, 1),
        "evals": [evaluation_entry(row) for row in run.evals],
        "verdict": verdict(run.rows, run.evals, prefixes, objective),
        "notes": list(run.notes),
        "tasks": [
            task_page_data(
                task,
                [row for row in run.rows if row.get("task", "") == task],
                runs,
                rules_of(prefixes, objective),
            )
            for task in tasks
        ],
    }


def evaluation_entry(row: Row) -> dict[str, Any]:
    """Return the fields of an evaluation that the page shows."""
    fields = ("step", "task", "accuracy", "low", "high", "problems", "length", "truncated")
    return {name: row[name] for name in fields if name in row}


def task_page_data(
    task: str, task_rows: list[Row], runs: int = 1, rules: Sequence[AlarmRule] = RULES
) -> dict[str, Any]:
    """Collect curves, alarms and positions of one task's rows."""
    alarm_monitor, alarms, bins = Alarms(rules), [], position_bins(task_rows)
    for row in task_rows:
        alarms += alarm_monitor.update(row)
    steps, curve_data = curves(
        task_rows, max(60, min(400, MAX_POINTS // runs)), {a.step for a in alarms}
    )
    return {
        "task": task,
        "alarms": [
            {
                "rule": alarm.rule.name,
                "metric": alarm.rule.metric,
                "step": alarm.step,
                "on": alarm_monitor.active.get(alarm.rule.name) is alarm,
                "means": alarm.rule.means,
                "remedy": alarm.rule.remedy,
                "tested": alarm.rule.tested,
                "value": finite_or_none(alarm.value),
                "error": finite_or_none(alarm.error),
                "range": alarm.rule.range,
            }
            for alarm in alarms
        ],
        "unwatched": alarm_monitor.unwatched,
        "steps": steps,
        "curves": curve_data,
        "maps": heat_maps(task_rows, bins, max(24, min(120, MAX_MAP_STEPS // runs))),
        "anatomy": divergence_breakdown(task_rows, bins),
    }


def curves(
    curve_rows: list[Row], max_points: int, kept_steps: Collection[int] = ()
) -> tuple[list[list[int]], dict[str, list[Any]]]:
    """Convert rows to thinned curves.

    Columns by position or by decile are skipped. A value that is not a finite number becomes None.

    Args:
        curve_rows: The rows.
        max_points: Approximate largest number of points of a curve.
        kept_steps: Steps that are always kept.

    Returns:
        Lists of steps, and column -> [index of its list of steps, values, standard errors or None].
    """
    columns: dict[str, list[Point]] = {}
    for row in curve_rows:
        for name, value in row.items():
            is_curve = "@" not in name and "%" not in name and not name.endswith("_se")
            if is_curve and name not in ("step", "task"):
                point = (row["step"], finite_or_none(value), finite_or_none(row.get(name + "_se")))
                columns.setdefault(name, []).append(point)
    steps: dict[tuple[int, ...], int] = {}
    curve_by_column = {}
    for name, points in columns.items():
        if any(value is not None for _, value, _ in points):
            point_steps, values, errors = zip(
                *thin_points(points, max_points, kept_steps), strict=True
            )
            error_values = list(errors) if any(error is not None for error in errors) else None
            curve_by_column[name] = [
                steps.setdefault(point_steps, len(steps)),
                list(values),
                error_values,
            ]
    return [list(point_steps) for point_steps in steps], curve_by_column


def thin_points(
    points: list[Point], max_points: int, kept_steps: Collection[int] = ()
) -> list[Point]:
    """Reduce points to about `max_points`, in order.

    Kept are the ends, the steps in `kept_steps`, and of each interval the lowest, the highest and
    the first missing value.

    Args:
        points: (step, value, standard error) of each point.
        max_points: Approximate largest number of points.
        kept_steps: Steps that are always kept.

    Returns:
        The remaining points.
    """
    if len(points) <= max_points:
        return points
    width = math.ceil(2 * len(points) / max_points)
    selected = {0, len(points) - 1} | {
        i for i, point in enumerate(points) if point[0] in kept_steps
    }
    for start in range(0, len(points), width):
        stretch = range(start, min(start + width, len(points)))
        present = [i for i in stretch if points[i][1] is not None]
        selected |= set([i for i in stretch if points[i][1] is None][:1])
        if present:
            selected |= {f(present, key=lambda i: points[i][1]) for f in (min, max)}
    return [points[i] for i in sorted(selected)]


def position_bins(task_rows: list[Row]) -> Bins:
    """Return column -> its position bins, in rising order."""
    bins: Bins = {}
    for key in dict.fromkeys(key for row in task_rows for key in row):
        if match := POSITION_BIN.match(key):
            bins.setdefault(match[1], []).append((int(match[2]), int(match[3])))
    return {name: sorted(column_bins) for name, column_bins in bins.items()}


def heat_maps(task_rows: list[Row], bins: Bins, max_steps: int) -> dict[str, Any]:
    """Convert columns by position to heat maps: steps, bins, values and, where counted, tokens."""
    maps_by_column: dict[str, Any] = {}
    for name, column_bins in bins.items():
        keys = [f"@{low}-{high}" for low, high in column_bins]
        rows_with_column = [row for row in task_rows if name + keys[0] in row]
        size = min(max_steps, len(rows_with_column))
        rows_with_column = [
            rows_with_column[round(i * (len(rows_with_column) - 1) / max(1, size - 1))]
            for i in range(size)
        ]
        values = [[finite_or_none(row.get(name + key)) for key in keys] for row in rows_with_column]
        if any(x is not None for column in values for x in column):
            tokens = [
                [finite_or_none(row.get("divergence/tokens" + key)) for key in keys]
                for row in rows_with_column
            ]
            maps_by_column[name] = {
                "steps": [row["step"] for row in rows_with_column],
                "bins": column_bins,
                "values": values,
                "tokens": tokens if name != "divergence/tokens" else None,
            }
    return maps_by_column


def divergence_breakdown(task_rows: list[Row], bins: Bins) -> dict[str, Any] | None:
    """Return the parts of the divergence by position, at the first and the last row with them."""
    rows_with_column = [row for row in task_rows if BREAKDOWN_METRICS[0] in row]
    column_bins = bins.get(BREAKDOWN_METRICS[0])
    if not rows_with_column or not column_bins:
        return None
    breakdown_rows = []
    for row in [rows_with_column[0], *rows_with_column[1:][-1:]]:
        parts = [
            [finite_or_none(row.get(f"{n}@{low}-{high}")) for low, high in column_bins]
            for n in BREAKDOWN_METRICS
        ]
        breakdown_rows.append({"step": row["step"], "parts": parts})
    return {"bins": column_bins, "rows": breakdown_rows}


def differing_settings(runs: list[RunRecord]) -> list[list[str]]:
    """Return [setting, value of each run] for settings that differ between the runs."""
    names = sorted({name for run in runs for name in run.config} - {"out"})
    differing = [n for n in names if len({json.dumps(run.config.get(n)) for run in runs}) > 1]
    return [[n, *(json.dumps(run.config.get(n)) for run in runs)] for n in differing]


def finite_or_none(value: Any) -> float | None:
    """Round to five significant digits; None for what is not a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round_significant(value)
