"""The record of a run as plain data for a page: curves, alarms, accuracy, positions, provenance.

Free of torch. A run whose tasks take turns has a part for each task: their curves are apart.
"""

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.alarms.alarms import Alarms
from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import check_fields, has_type, read_object, short
from diagnostics.records import rows
from diagnostics.records.renamed import present_settings
from diagnostics.records.rows import Row
from opd.runs.restart import history
from opd.runs.result import verdict

OUTCOMES = re.compile(r"[01]+(?: [01]+)*")
POINTS, COLUMNS = 1600, 480
"""Most points of a column and most steps of a heat map, over all the runs of a page."""
BIN = re.compile(r"^(.*)@(\d+)-(\d+)$")
LONGEST_NAME = 1000
"""Most characters of the name of a model; file systems hold fewer."""
CODE = 40_000
"""Most characters of code.txt that are shown."""
ANATOMY = ("divergence/kl_binary", "divergence/kl_head", "divergence/kl_tail")
Point = tuple[Any, ...]
Bins = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class RunRecord:
    """The record of a run: its folder, settings, code state, rows and evaluations."""

    folder: Path
    config: dict[str, Any]
    code: str
    rows: list[Row]
    evals: list[Row]
    notes: tuple[str, ...] = ()
    """What of the record was left out."""
    models: bool = False
    """Whether folders outside the run's own may be read because its record names them."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def may_read(run: RunRecord, path: Path) -> bool:
    """Whether a file or folder lies within the run folder, links followed, or `models` allows it.

    A record may come from elsewhere: what it names or links to outside is not read for it.
    """
    return run.models or path.resolve().is_relative_to(run.folder.resolve())


def read_run(folder: Path, models: bool = False) -> RunRecord:
    """The record of a run folder, finished or not; a stranger's may be a file of rows alone.

    Args:
      models: see `Run.models`.

    Raises:
      ValueError: a file of the record is a link that leads out of the folder, or is damaged.
      FileNotFoundError: it has neither config.json nor a file of rows.
    """
    config, code, file = folder / "config.json", folder / "code.txt", rows_file(folder)
    if not config.exists() and not file.exists():
        raise MissingFile(
            f"{folder} is no run folder: it has neither config.json nor rows.jsonl, nor one single "
            f"other .jsonl file with the rows of a monitor{remedy(folder)}"
        )
    for path in (config, code, file, folder / "evals.jsonl", folder / "starts.jsonl"):
        if not models and not path.resolve().is_relative_to(folder.resolve()):
            raise InvalidInput(
                f"{path} is a link to {path.resolve()}, outside the run folder: put the file "
                "itself there, or allow it by --models"
            )
    written = code.read_text("utf-8", "replace") if code.exists() else "unknown: no code.txt"
    return RunRecord(
        folder=folder,
        config=run_settings(config),
        code="\n".join([*history(folder), written]),
        rows=latest(checked_values(rows.read(file, {"step": int}), file)),
        evals=checked_evaluations(
            rows.read(folder / "evals.jsonl", {"step": int}), folder / "evals.jsonl"
        ),
        notes=tuple(note for path in (file, folder / "evals.jsonl") for note in cut_short(path)),
        models=models,
    )


def remedy(path: Path) -> str:
    """What to name instead of a path that is no run folder, as the end of a sentence, or ""."""
    if path.is_file():
        return f"; it is a file: name its folder, {path.parent}"
    inside = sorted(str(file.parent) for file in path.glob("*/rows.jsonl"))
    return f"; run folders in it: {' '.join(inside[:8])}" if inside else ""


def run_settings(path: Path) -> dict[str, Any]:
    """A run's config.json; empty where there is none, or where it is another program's.

    A trainer may keep the configuration of its model under the same name beside a monitor's rows.
    """
    config = present_settings(read_object(path)) if path.exists() else {}
    if not all(isinstance(config.get(name), str) for name in ("student", "teacher")):
        return {}
    tasks = config.get("tasks") or []
    check_fields({"tasks": tasks}, {"tasks": list}, str(path))
    for i, task in enumerate(tasks):
        where = f"{path}, tasks[{i}]"
        if not isinstance(task, dict):
            raise InvalidInput(f"{where}: {short(task)} is not an object")
        check_fields({"teacher": "", **without_null(task)}, {"name": str, "teacher": str}, where)
    models = [config["student"], config["teacher"], *(task.get("teacher") for task in tasks)]
    for name in models:
        if name is not None and ("\0" in name or len(name) > LONGEST_NAME):
            raise InvalidInput(f"{path}: {short(name)} is no folder or name of a model")
    return config


def without_null(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None}


def checked_evaluations(found: list[Row], path: Path) -> list[Row]:
    """`checked_values` of evaluations, whose outcomes are those of their problems besides.

    Raises:
      ValueError: names the row, the field and the value.
    """
    for i, row in enumerate(checked_values(found, path), 1):
        outcomes = row.get("outcomes", "0")
        possible = {
            "accuracy": lambda x: x is None or has_type(x, float),
            "length": lambda x: x is None or has_type(x, float),
            "problems": lambda x: has_type(x, int) and x >= 1,
            "outcomes": lambda x: isinstance(x, str) and OUTCOMES.fullmatch(x) is not None,
        }
        for name, allows in possible.items():
            if name in row and not allows(row[name]):
                raise InvalidInput(
                    f"{path} row {i}, field {name}: {short(row[name])} is impossible"
                )
        count = len(outcomes.split()) if " " in outcomes else row.get("problems", 1)
        if "outcomes" in row and len(outcomes.replace(" ", "")) % count:
            raise InvalidInput(
                f"{path} row {i}, field outcomes: {short(outcomes)} is not of {count} problems"
            )
    return found


def checked_values(found: list[Row], path: Path) -> list[Row]:
    """The rows, whose metrics are numbers or null and whose task is text.

    Raises:
      ValueError: names the row, the field and the value.
    """
    watched = {rule.metric for rule in Alarms().rules.values()}
    for i, row in enumerate(found, 1):
        for name, value in row.items():
            is_metric = "/" in name or name.removesuffix("_se") in watched
            plain = value is None or isinstance(value, bool) or has_type(value, float)
            if (is_metric and not plain) or (name == "task" and not isinstance(value, str)):
                expected = "a number or null" if is_metric else "text"
                raise InvalidInput(
                    f"{path} row {i}, field {name}: {short(value)} is not {expected}; mend or drop "
                    "the row"
                )
    return found


def cut_short(path: Path) -> list[str]:
    """A note where the last line of a file of rows is half-written: `rows.read` leaves it out."""
    text = path.read_text("utf-8", "replace") if path.exists() else ""
    lines = text.removesuffix("\n").split("\n")
    try:
        json.loads(lines[-1] or "{}")
    except ValueError:
        return [f"{path.name} line {len(lines)} is cut short and left out"]
    return []


def rows_file(folder: Path) -> Path:
    """rows.jsonl; where there is none, the single other .jsonl file of the folder.

    A monitor in a stranger's trainer writes its rows under the name that its user chose.
    """
    path = folder / "rows.jsonl"
    own = ("evals.jsonl", "starts.jsonl")
    others = [file for file in sorted(folder.glob("*.jsonl")) if file.name not in own]
    return others[0] if not path.exists() and len(others) == 1 else path


def latest(found: Iterable[Row]) -> list[Row]:
    """Rows by rising step; of rows with one step the last counts."""
    by_step = {row["step"]: row for row in found}
    return [by_step[step] for step in sorted(by_step)]


def recorded(run: RunRecord, runs: int = 1) -> dict[str, Any]:
    """What the page shows of a run's record, `runs` of which share the page."""
    tasks = list(dict.fromkeys(row.get("task", "") for row in run.rows)) or [""]
    seconds = sum(v or 0 for row in run.rows for k, v in row.items() if k.startswith("seconds/"))
    code = run.code.strip()
    return {
        "name": run.name,
        "folder": str(run.folder),
        "config": run.config,
        "code": code[:CODE] + ("\n… cut here" if len(code) > CODE else ""),
        "done": run.rows[-1]["step"] + 1 if run.rows else 0,
        "seconds": round(seconds, 1),
        "evals": [evaluated(row) for row in run.evals],
        "verdict": verdict(run.rows, run.evals),
        "notes": list(run.notes),
        "tasks": [
            part(task, [row for row in run.rows if row.get("task", "") == task], runs)
            for task in tasks
        ],
    }


def evaluated(row: Row) -> dict[str, Any]:
    kept = ("step", "task", "accuracy", "low", "high", "problems", "length", "truncated")
    return {name: row[name] for name in kept if name in row}


def part(task: str, found: list[Row], runs: int = 1) -> dict[str, Any]:
    """Curves, alarms and positions of one task's rows."""
    watching, raised, bins = Alarms(), [], binned(found)
    for row in found:
        raised += watching.update(row)
    steps, drawn = curves(found, max(60, min(400, POINTS // runs)), {a.step for a in raised})
    return {
        "task": task,
        "alarms": [
            {
                "rule": alarm.rule.name,
                "metric": alarm.rule.metric,
                "step": alarm.step,
                "on": watching.active.get(alarm.rule.name) is alarm,
                "means": alarm.rule.means,
                "remedy": alarm.rule.remedy,
                "tested": alarm.rule.tested,
                "value": number(alarm.value),
                "error": number(alarm.error),
                "range": alarm.rule.range,
            }
            for alarm in raised
        ],
        "unwatched": watching.unwatched,
        "steps": steps,
        "curves": drawn,
        "maps": maps(found, bins, max(24, min(120, COLUMNS // runs))),
        "anatomy": anatomy(found, bins),
    }


def curves(
    found: list[Row], most: int, kept: Collection[int] = ()
) -> tuple[list[list[int]], dict[str, list[Any]]]:
    """Lists of steps; column to [which of them, values, standard errors or None], thinned.

    Columns by position or by tenth are left out. A value that is no finite number is None.
    """
    columns: dict[str, list[Point]] = {}
    for row in found:
        for name, value in row.items():
            plain = "@" not in name and "%" not in name and not name.endswith("_se")
            if plain and name not in ("step", "task"):
                point = (row["step"], number(value), number(row.get(name + "_se")))
                columns.setdefault(name, []).append(point)
    steps: dict[tuple[int, ...], int] = {}
    made = {}
    for name, points in columns.items():
        if any(value is not None for _, value, _ in points):
            at, values, errors = zip(*thinned(points, most, kept), strict=True)
            spread = list(errors) if any(error is not None for error in errors) else None
            made[name] = [steps.setdefault(at, len(steps)), list(values), spread]
    return [list(at) for at in steps], made


def thinned(points: list[Point], most: int, kept: Collection[int] = ()) -> list[Point]:
    """About `most` of the points, in order: ends, steps in `kept`, and of each stretch the extent.

    The extent of a stretch is its lowest, its highest and its first missing value.
    """
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / most)
    chosen = {0, len(points) - 1} | {i for i, point in enumerate(points) if point[0] in kept}
    for start in range(0, len(points), width):
        stretch = range(start, min(start + width, len(points)))
        known = [i for i in stretch if points[i][1] is not None]
        chosen |= set([i for i in stretch if points[i][1] is None][:1])
        if known:
            chosen |= {f(known, key=lambda i: points[i][1]) for f in (min, max)}
    return [points[i] for i in sorted(chosen)]


def binned(found: list[Row]) -> Bins:
    """Column to its position bins, rising."""
    bins: Bins = {}
    for key in dict.fromkeys(key for row in found for key in row):
        if match := BIN.match(key):
            bins.setdefault(match[1], []).append((int(match[2]), int(match[3])))
    return {name: sorted(known) for name, known in bins.items()}


def maps(found: list[Row], bins: Bins, most: int) -> dict[str, Any]:
    """Column to position by step: bins, steps, values and, where counted, tokens of each bin."""
    made: dict[str, Any] = {}
    for name, places in bins.items():
        keys = [f"@{low}-{high}" for low, high in places]
        have = [row for row in found if name + keys[0] in row]
        size = min(most, len(have))
        have = [have[round(i * (len(have) - 1) / max(1, size - 1))] for i in range(size)]
        values = [[number(row.get(name + key)) for key in keys] for row in have]
        if any(x is not None for column in values for x in column):
            tokens = [[number(row.get("divergence/tokens" + key)) for key in keys] for row in have]
            made[name] = {
                "steps": [row["step"] for row in have],
                "bins": places,
                "values": values,
                "tokens": tokens if name != "divergence/tokens" else None,
            }
    return made


def anatomy(found: list[Row], bins: Bins) -> dict[str, Any] | None:
    """The parts of the divergence by position, at the first and the last row that has them."""
    have = [row for row in found if ANATOMY[0] in row]
    places = bins.get(ANATOMY[0])
    if not have or not places:
        return None
    made = []
    for row in [have[0], *have[1:][-1:]]:
        parts = [[number(row.get(f"{n}@{low}-{high}")) for low, high in places] for n in ANATOMY]
        made.append({"step": row["step"], "parts": parts})
    return {"bins": places, "rows": made}


def differences(runs: list[RunRecord]) -> list[list[str]]:
    """[setting, value of each run]: of settings that are not the same in all; not where it is."""
    names = sorted({name for run in runs for name in run.config} - {"out"})
    changed = [n for n in names if len({json.dumps(run.config.get(n)) for run in runs}) > 1]
    return [[n, *(json.dumps(run.config.get(n)) for run in runs)] for n in changed]


def number(value: Any) -> float | None:
    """Five significant digits; None for what is no finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
