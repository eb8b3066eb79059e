"""What a run does to its record when it starts again: rows set aside, gaps and changes told.

starts.jsonl has a line for every start: its first step, when, by which code and versions, and what
was lacking. Nothing of the record is deleted: rows, evaluations and batches after the checkpoint,
which are computed again, and checkpoints that are damaged, are kept in dropped/.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.provenance import CodeState, code_state, package_version
from diagnostics.records import rows
from diagnostics.records.rows import Row
from opd.runs.run_folder import Start
from opd.runtime import distributed
from opd.runtime.staged_folders import step_of

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")
IDENTITY = ("commit", "source", "version", "python", "libraries", "processes")
"""What of a start's line may change the numbers of its steps."""


def begin(folder: Path, start: Start) -> None:
    """Bring the record to the step of the start, and add the start to starts.jsonl.

    To be called by every process, after the checkpoint was loaded. What is lacking, damaged or
    another than at the last start is printed to stderr.

    Raises:
      InvalidInput: a row of the record has no step; names the file and the line.
    """
    distributed.barrier()  # all have read
    if distributed.rank() == 0:
        before = rows.read(folder / "starts.jsonl")
        line = described(len(before) + 1, start)
        lacking = missing(folder, start)
        dropped = folder / "dropped" / f"before_start_{len(before) + 1:03d}"
        count = rewind(folder, start, dropped)
        code = code_state()
        keep_code(folder, code, len(before) + 1, before)
        line |= identity(code) | ({"missing": lacking} if lacking else {})
        rows.append(folder / "starts.jsonl", line)
        for message in messages(folder, start, before, line, lacking, count, dropped):
            print(message, file=sys.stderr)
    distributed.barrier()


def described(number: int, start: Start) -> dict[str, Any]:
    """When and where a start begins."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    damaged = {"damaged": dict(start.damaged)} if start.damaged else {}
    return {"start": number, "step": start.step, "time": now, **damaged}


def identity(code: CodeState) -> dict[str, Any]:
    """By what the steps of a start are computed."""
    return {
        "commit": code.commit,
        "changed_files": list(code.changed),
        "source": code.source,
        "version": code.version,
        "python": platform.python_version(),
        "libraries": {name: package_version(name) for name in LIBRARIES},
        "processes": distributed.size(),
    }


def keep_code(folder: Path, code: CodeState, number: int, before: list[Row]) -> None:
    """Write the first start's code state to code.txt, that of a changed source to code_NUMBER.txt.

    The first line is the commit; the difference to it follows.
    """
    name = f"code_{number:03d}.txt" if (folder / "code.txt").exists() else "code.txt"
    known = {row.get("source") for row in before}
    if name == "code.txt" or (before and code.source not in known):
        about = f"version {code.version}, source {code.source}"
        write_text(folder / name, f"commit {code.commit}\n{about}\n{code.difference}")


def missing(folder: Path, start: Start) -> dict[str, Any]:
    """What the record lacks of the steps before the checkpoint: steps without a row, evaluations.

    Steps are ranges [first, last].
    """
    if not start.checkpoint:
        return {}
    there = {step(row, folder / "rows.jsonl", i) for i, row in numbered(folder / "rows.jsonl")}
    lacking: dict[str, Any] = {}
    if gaps := ranges(i for i in range(start.step) if i not in there):
        lacking["steps"] = gaps
    state = json.loads((Path(start.checkpoint) / "state.json").read_text("utf-8"))
    count = len(rows.read(folder / "evals.jsonl"))
    if count < state.get("evaluations", 0):
        lacking["evaluations"] = state["evaluations"] - count
    return lacking


def rewind(folder: Path, start: Start, dropped: Path) -> int:
    """Move what will be computed again, and damaged checkpoints, to `dropped`; how many rows."""
    begun = bool(start.checkpoint)
    count = drop_rows(folder / "rows.jsonl", lambda at: at < start.step, dropped)
    drop_rows(folder / "evals.jsonl", lambda at: begun and at <= start.step, dropped)
    later = [
        path
        for path in (folder / "batches").glob("step_*.safetensors")
        if step_of(path) >= start.step
    ]
    for path in [*later, *map(Path, start.damaged)]:
        target = dropped / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return count


def drop_rows(path: Path, keep: Callable[[int], bool], dropped: Path) -> int:
    """Rewrite a file of rows with those to keep, after the others were written to `dropped`."""
    kept, other = list[Row](), list[Row]()
    for i, row in numbered(path):
        (kept if keep(step(row, path, i)) else other).append(row)
    if other:
        write_text(dropped / path.name, "".join(json.dumps(row) + "\n" for row in other))
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return len(other)


def numbered(path: Path) -> Iterable[tuple[int, Row]]:
    """The rows of a file with the numbers of their lines."""
    return enumerate(rows.read(path), 1)


def step(row: Any, path: Path, line: int) -> int:
    """The step of a row.

    Raises:
      InvalidInput: it has none.
    """
    value = row.get("step") if isinstance(row, dict) else None
    if not isinstance(value, int):
        raise InvalidInput(
            f"{path} line {line} has no whole number as its step: {json.dumps(row)[:80]}; take the "
            "line out, and the same command resumes"
        )
    return value


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Rising numbers as ranges [first, last]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def messages(
    folder: Path,
    start: Start,
    before: list[Row],
    line: Mapping[str, Any],
    lacking: Mapping[str, Any],
    count: int,
    dropped: Path,
) -> list[str]:
    """What a user should know about this start, a line each."""
    told = [f"{folder} goes on at step {start.step}"] if start.checkpoint else []
    for path, problem in start.damaged.items():
        told.append(
            f"{path} is damaged ({problem}) and was moved to {dropped}; the run goes on from "
            f"{start.checkpoint}"
        )
    if steps := lacking.get("steps"):
        told.append(
            f"{folder / 'rows.jsonl'} lacks the rows of steps {in_words(steps)}, which come before "
            f"the checkpoint at step {start.step}: they were lost and are not computed again; the "
            "gap is recorded in starts.jsonl"
        )
    if number := lacking.get("evaluations"):
        told.append(
            f"{folder / 'evals.jsonl'} lacks {number} evaluations from before step "
            f"{start.step}; they are not repeated"
        )
    if count:
        told.append(
            f"{count} rows from step {start.step} on are computed again; the old ones are "
            f"in {dropped}"
        )
    if before:
        told += [f"from step {start.step} on, {what}" for what in differences(before[-1], line)]
    return told


def in_words(steps: Iterable[Iterable[int]]) -> str:
    """Ranges [first, last] as text."""
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in steps)


def history(folder: Path) -> list[str]:
    """What a reader of a run's record should know of its starts after the first, a line each."""
    lines = []
    for old, new in pairwise(rows.read(folder / "starts.jsonl")):
        lacking, facts = new.get("missing", {}), differences(old, new)
        if steps := lacking.get("steps"):
            facts.append(f"the record lacks the rows of steps {in_words(steps)}")
        if number := lacking.get("evaluations"):
            facts.append(f"the record lacks {number} evaluations")
        facts += [f"a damaged checkpoint was passed over: {x}" for x in new.get("damaged", ())]
        text = "; ".join(facts) or "by the same code, from a whole record"
        lines.append(f"started again at step {new.get('step')}: {text}")
    return lines


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What computes the steps now and did not at the last start."""
    found = []
    for name in IDENTITY:
        if name not in old or name not in new or old[name] == new[name]:
            continue
        if name == "libraries":
            found += [
                f"{library} is {version} instead of {old[name].get(library)}"
                for library, version in new[name].items()
                if old[name].get(library) != version
            ]
        else:
            label = {"source": "the source code's hash", "version": "the version of opdlab"}
            found.append(f"{label.get(name, name)} is {new[name]} instead of {old[name]}")
    return found
