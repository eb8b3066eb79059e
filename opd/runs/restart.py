"""Resume a run: set aside rows to be recomputed, and report gaps and changes of the code.

starts.jsonl has a line per start: its first step, time, code and library versions, and gaps of the
record. Nothing is deleted: rows, evaluations and batches after the checkpoint, which will be
recomputed, and damaged checkpoints are moved to dropped/.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.provenance import CodeState, code_state, package_version
from diagnostics.records import rows
from diagnostics.records.rows import Row
from diagnostics.records.run_folder import RunFolder
from opd.runs.run_folder import Start
from opd.runtime import distributed
from opd.runtime.staged_folders import step_number

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")
IDENTITY_FIELDS = ("commit", "source", "version", "python", "libraries", "processes")
"""Fields of a start that may change the numbers of its steps."""


def begin_start(folder: Path, start: Start) -> None:
    """Rewind the record to the step of the start, and append the start to starts.jsonl.

    Every rank must call this function, after the checkpoint was loaded. Gaps, damaged checkpoints
    and changes since the last start are printed to stderr.

    Args:
        folder: Run folder.
        start: Where the run continues.

    Raises:
        InvalidInput: A row of the record has no step; the message names the file and the line.
    """
    distributed.barrier()  # all ranks have read the record
    if distributed.rank() == 0:
        earlier_starts = rows.read_rows(folder / "starts.jsonl")
        start_row = describe_start(len(earlier_starts) + 1, start)
        record_gaps = find_missing(folder, start)
        dropped = folder / "dropped" / f"before_start_{len(earlier_starts) + 1:03d}"
        num_dropped = rewind(folder, start, dropped)
        code = loaded_code()
        save_code_state(folder, code, len(earlier_starts) + 1, earlier_starts)
        start_row |= code_identity(code) | ({"missing": record_gaps} if record_gaps else {})
        rows.append_row(folder / "starts.jsonl", start_row)
        for message in start_messages(
            folder, start, earlier_starts, start_row, record_gaps, num_dropped, dropped
        ):
            print(message, file=sys.stderr)
    distributed.barrier()


def describe_start(number: int, start: Start) -> dict[str, Any]:
    """Return number, first step and time of a start, with the damaged checkpoints."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    damaged = {"damaged": dict(start.damaged)} if start.damaged else {}
    return {"start": number, "step": start.step, "time": now, **damaged}


def code_identity(code: CodeState) -> dict[str, Any]:
    """Return commit, versions and number of processes that compute the steps of a start."""
    return {
        "commit": code.commit,
        "changed_files": list(code.changed_files),
        "source": code.source,
        "version": code.version,
        "python": platform.python_version(),
        "libraries": {name: package_version(name) for name in LIBRARIES},
        "processes": distributed.world_size(),
    }


@cache
def loaded_code() -> CodeState:
    """Return the version of the code, read once: this process loads no later change of a file."""
    return code_state()


def save_code_state(folder: Path, code: CodeState, number: int, earlier_starts: list[Row]) -> None:
    """Write the code state of a start to code.txt, or to code_NUMBER.txt if the source changed.

    The first line of the file is the commit; the difference to it follows.

    Args:
        folder: Run folder.
        code: Commit, versions, and the difference of the working tree to the commit.
        number: Number of the start.
        earlier_starts: Rows of starts.jsonl.
    """
    name = f"code_{number:03d}.txt" if (folder / "code.txt").exists() else "code.txt"
    known_sources = {row.get("source") for row in earlier_starts}
    if name == "code.txt" or (earlier_starts and code.source not in known_sources):
        version_line = f"version {code.version}, source {code.source}"
        write_text(folder / name, f"commit {code.commit}\n{version_line}\n{code.diff}")


def find_missing(folder: Path, start: Start) -> dict[str, Any]:
    """Find what the record lacks before the checkpoint.

    Args:
        folder: Run folder.
        start: Where the run continues.

    Returns:
        "steps", ranges [first, last] of steps without a row, and "evaluations", their number; empty
        if nothing is missing.
    """
    if not start.checkpoint:
        return {}
    recorded_steps = {
        step_of_row(row, folder / "rows.jsonl", i)
        for i, row in numbered_rows(folder / "rows.jsonl")
    }
    record_gaps: dict[str, Any] = {}
    if gaps := to_ranges(i for i in range(start.step) if i not in recorded_steps):
        record_gaps["steps"] = gaps
    state = json.loads((Path(start.checkpoint) / "state.json").read_text("utf-8"))
    count = len(rows.read_rows(folder / "evals.jsonl"))
    if count < state.get("evaluations", 0):
        record_gaps["evaluations"] = state["evaluations"] - count
    return record_gaps


def rewind(folder: Path, start: Start, dropped: Path) -> int:
    """Move what will be recomputed, and damaged checkpoints, to `dropped`.

    Args:
        folder: Run folder.
        start: Where the run continues.
        dropped: Folder that receives them.

    Returns:
        Number of rows that were moved.
    """
    has_checkpoint = bool(start.checkpoint)
    num_dropped = drop_rows(folder / "rows.jsonl", lambda row_step: row_step < start.step, dropped)
    drop_rows(
        folder / "evals.jsonl", lambda row_step: has_checkpoint and row_step <= start.step, dropped
    )
    later_batches = [
        path
        for path in (folder / "batches").glob("step_*.safetensors")
        if step_number(path) >= start.step
    ]
    for path in [*later_batches, *map(Path, start.damaged)]:
        target = dropped / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return num_dropped


def drop_rows(path: Path, keep: Callable[[int], bool], dropped: Path) -> int:
    """Rewrite a JSONL file with the rows to keep, after writing the others to `dropped`.

    Args:
        path: File of rows.
        keep: Whether to keep a row of a given step.
        dropped: Folder that receives the other rows.

    Returns:
        Number of dropped rows.
    """
    kept_rows, dropped_rows = list[Row](), list[Row]()
    for i, row in numbered_rows(path):
        (kept_rows if keep(step_of_row(row, path, i)) else dropped_rows).append(row)
    if dropped_rows:
        write_text(dropped / path.name, "".join(json.dumps(row) + "\n" for row in dropped_rows))
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept_rows))
    return len(dropped_rows)


def numbered_rows(path: Path) -> Iterable[tuple[int, Row]]:
    """Return the rows of a file with their line numbers."""
    return enumerate(rows.read_rows(path), 1)


def step_of_row(row: Any, path: Path, line: int) -> int:
    """Return the step of a row.

    Args:
        row: The row.
        path: Its file, for the message.
        line: Its line number, for the message.

    Returns:
        The step.

    Raises:
        InvalidInput: The row has none.
    """
    value = row.get("step") if isinstance(row, dict) else None
    if not isinstance(value, int):
        raise InvalidInput(
            f"{path} line {line} has no integer step: {json.dumps(row)[:80]}; delete the line, and "
            "run the same command to resume"
        )
    return value


def to_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Combine ascending numbers into ranges [first, last]."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def start_messages(
    folder: Path,
    start: Start,
    earlier_starts: list[Row],
    start_row: Mapping[str, Any],
    record_gaps: Mapping[str, Any],
    num_dropped: int,
    dropped: Path,
) -> list[str]:
    """List what the user should know about a start.

    Args:
        folder: Run folder.
        start: Where the run continues.
        earlier_starts: Rows of starts.jsonl before this start.
        start_row: Row of this start.
        record_gaps: Result of `find_missing`.
        num_dropped: Number of rows that will be recomputed.
        dropped: Folder of the old rows.

    Returns:
        One line per message.
    """
    lines = [f"{folder} resumes at step {start.step}"] if start.checkpoint else []
    for path, problem in start.damaged.items():
        lines.append(
            f"{path} is damaged ({problem}) and was moved to {dropped}; the run resumes from "
            f"{start.checkpoint}"
        )
    if steps := record_gaps.get("steps"):
        lines.append(
            f"{folder / 'rows.jsonl'} lacks the rows of steps {format_ranges(steps)} before the "
            f"checkpoint at step {start.step}; they are not recomputed, and the gap is recorded in "
            "starts.jsonl"
        )
    if number := record_gaps.get("evaluations"):
        lines.append(
            f"{folder / 'evals.jsonl'} lacks {number} evaluations from before step "
            f"{start.step}; they are not repeated"
        )
    if num_dropped:
        lines.append(
            f"{num_dropped} rows from step {start.step} on will be recomputed; the old ones are in "
            f"{dropped}"
        )
    if earlier_starts:
        lines += [
            f"from step {start.step} on, {difference}"
            for difference in start_differences(earlier_starts[-1], start_row)
        ]
    return lines


def format_ranges(steps: Iterable[Iterable[int]]) -> str:
    """Format ranges [first, last] as text."""
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in steps)


def start_history(folder: RunFolder) -> list[str]:
    """List what a reader of the record should know about each restart, one line each."""
    lines = []
    for old, new in pairwise(folder.starts()):
        record_gaps, notes = new.get("missing", {}), start_differences(old, new)
        if steps := record_gaps.get("steps"):
            notes.append(f"the record lacks the rows of steps {format_ranges(steps)}")
        if number := record_gaps.get("evaluations"):
            notes.append(f"the record lacks {number} evaluations")
        notes += [f"a damaged checkpoint was skipped: {x}" for x in new.get("damaged", ())]
        text = "; ".join(notes) or "same code, complete record"
        lines.append(f"restarted at step {new.get('step')}: {text}")
    return lines


def start_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List changes of code, versions and processes between two starts."""
    changes = []
    for name in IDENTITY_FIELDS:
        if name not in old or name not in new or old[name] == new[name]:
            continue
        if name == "libraries":
            changes += [
                f"{library} is {version} instead of {old[name].get(library)}"
                for library, version in new[name].items()
                if old[name].get(library) != version
            ]
        else:
            label = {"source": "the source code's hash", "version": "the version of opdlab"}
            changes.append(f"{label.get(name, name)} is {new[name]} instead of {old[name]}")
    return changes
