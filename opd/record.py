"""The record of a run as plain data for a page: curves, alarms, accuracy, positions, provenance.

Free of torch. A run whose tasks take turns has a part for each task: their curves are apart.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics import rows
from diagnostics.alarms import Alarms
from diagnostics.rows import Row

POINTS = 400
"""Most points of a curve; of more, those are kept that show its extent."""
STEPS = 120
"""Most columns of a heat map."""
BIN = re.compile(r"^(.*)@(\d+)-(\d+)$")
MAPS = {
    "drift/reverse_kl": "Reverse KL, nats",
    "drift/k1": "Sampled cost, nats",
    "drift/log_ratios_q95": "95 % quantile of the cost, nats",
    "drift/outside_topk_expected": "Student's mass outside the teacher's top-K",
    "drift/student_entropy": "Student's entropy, nats",
    "drift/teacher_entropy": "Teacher's entropy, nats",
    "drift/teacher_max": "Teacher's largest probability",
}
Bins = dict[str, list[tuple[int, int]]]
ANATOMY = ("drift/kl_binary", "drift/kl_head", "drift/kl_tail")


@dataclass(frozen=True)
class Run:
    """The record of a run: its folder, settings, code state, rows and evaluations."""

    folder: Path
    config: dict[str, Any]
    code: str
    rows: list[Row]
    evals: list[Row]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """The record of a run folder, finished or not.

    Raises:
      FileNotFoundError: it has no config.json.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json")
    code = folder / "code.txt"
    return Run(
        folder=folder,
        config=json.loads((folder / "config.json").read_text()),
        code=code.read_text().splitlines()[0] if code.exists() else "unknown",
        rows=rows.read(folder / "rows.jsonl"),
        evals=rows.read(folder / "evals.jsonl"),
    )


def recorded(run: Run) -> dict[str, Any]:
    """What the page shows of a run's record."""
    tasks = list(dict.fromkeys(row.get("task", "") for row in run.rows)) or [""]
    seconds = sum(v or 0 for row in run.rows for k, v in row.items() if k.startswith("seconds/"))
    return {
        "name": run.name,
        "folder": str(run.folder),
        "objective": run.config["objective"],
        "seed": run.config["seed"],
        "student": run.config["student"],
        "teacher": run.config["teacher"],
        "code": run.code,
        "done": run.rows[-1]["step"] + 1 if run.rows else 0,
        "steps": run.config["steps"],
        "seconds": round(seconds, 1),
        "evals": [evaluated(row) for row in run.evals],
        "tasks": [
            part(task, [row for row in run.rows if row.get("task", "") == task]) for task in tasks
        ],
    }


def evaluated(row: Row) -> dict[str, Any]:
    kept = ("step", "task", "accuracy", "low", "high", "problems", "length", "truncated")
    return {name: row[name] for name in kept if name in row}


def part(task: str, found: list[Row]) -> dict[str, Any]:
    """Curves, alarms and positions of one task's rows."""
    watching, raised, bins = Alarms(), [], binned(found)
    for row in {row["step"]: row for row in found}.values():
        raised += watching.update(row)
    return {
        "task": task,
        "alarms": [
            {
                "rule": alarm.rule.name,
                "step": alarm.step,
                "on": alarm.rule.name in watching.active,
                "means": alarm.rule.means,
                "remedy": alarm.rule.remedy,
                "tested": alarm.rule.tested,
                "value": number(alarm.value),
                "error": number(alarm.error),
                "range": alarm.rule.range,
            }
            for alarm in raised
        ],
        "rules": len(watching.rules),
        "unwatched": watching.unwatched,
        "curves": curves(found),
        "maps": [made for name, title in MAPS.items() if (made := heat(found, name, title, bins))],
        "anatomy": anatomy(found, bins),
    }


def curves(found: list[Row]) -> dict[str, list[list[float | None]]]:
    """Column to [steps, values, standard errors], thinned; columns by position are left out."""
    columns: dict[str, list[tuple[Any, ...]]] = {}
    for row in found:
        for name, value in row.items():
            plain = "@" not in name and "%" not in name and not name.endswith("_se")
            if plain and name not in ("step", "task"):
                columns.setdefault(name, []).append((row["step"], value, row.get(name + "_se")))
    made = {}
    for name, points in columns.items():
        if any(isinstance(value, int | float) for _, value, _ in points):
            clean = [(step, number(x), number(error)) for step, x, error in thinned(points)]
            made[name] = [list(column) for column in zip(*clean, strict=True)]
    return made


def thinned(points: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """At most about POINTS of the points, with the lowest and highest of each stretch, in order."""
    if len(points) <= POINTS:
        return points
    width = math.ceil(2 * len(points) / POINTS)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), width):
        stretch = range(start, min(start + width, len(points)))
        known = [i for i in stretch if points[i][1] is not None]
        if known:
            kept |= {f(known, key=lambda i: points[i][1]) for f in (min, max)}
    return [points[i] for i in sorted(kept)]


def binned(found: list[Row]) -> dict[str, list[tuple[int, int]]]:
    """Column to its position bins, rising."""
    bins: dict[str, list[tuple[int, int]]] = {}
    for key in dict.fromkeys(key for row in found for key in row):
        if match := BIN.match(key):
            bins.setdefault(match[1], []).append((int(match[2]), int(match[3])))
    return {name: sorted(known) for name, known in bins.items()}


def heat(found: list[Row], name: str, title: str, bins: Bins) -> dict[str, Any] | None:
    """Position by step: bins, steps, values and, where tokens were counted, how many per bin."""
    have = [row for row in found if name + "@0-1" in row]
    if not have:
        return None
    chosen = sorted({round(j * (len(have) - 1) / (STEPS - 1)) for j in range(STEPS)})
    have, keys = [have[i] for i in chosen], [f"@{low}-{high}" for low, high in bins[name]]
    return {
        "name": name,
        "title": title,
        "steps": [row["step"] for row in have],
        "bins": bins[name],
        "values": [[number(row.get(name + key)) for key in keys] for row in have],
        "tokens": [[number(row.get("drift/tokens" + key)) for key in keys] for row in have],
    }


def anatomy(found: list[Row], bins: Bins) -> dict[str, Any] | None:
    """The parts of the divergence by position, at the first and the last row that has them."""
    have = [row for row in found if ANATOMY[0] in row]
    if not have:
        return None
    made = []
    for row in [have[0], *have[1:][-1:]]:
        places = bins[ANATOMY[0]]
        parts = [[number(row.get(f"{n}@{low}-{high}")) for low, high in places] for n in ANATOMY]
        made.append({"step": row["step"], "bins": places, "parts": parts})
    return {"names": ["in or out of S", "within S", "beyond S"], "rows": made}


def differences(runs: list[Run]) -> list[list[str]]:
    """[setting, value of each run]: of settings that are not the same in all; not where it is."""
    names = sorted({name for run in runs for name in run.config} - {"out"})
    changed = [n for n in names if len({json.dumps(run.config.get(n)) for run in runs}) > 1]
    return [[n, *(json.dumps(run.config.get(n)) for run in runs)] for n in changed]


def number(value: Any) -> float | None:
    """Five significant digits; None for what is no finite number."""
    try:
        return float(f"{value:.5g}") if math.isfinite(value) else None
    except (TypeError, ValueError):
        return None
