"""The `opd diagnose` command."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput

if TYPE_CHECKING:
    pass
from opd.analysis.diagnose import LEVELS, _of_records, batch_files, diagnose

RECORDS = (".jsonl", ".parquet")


def main(argv: list[str]) -> None:
    """`opd diagnose PATH [PATH ...] [--student M --teacher M] [--task NAME] [--json]`."""
    given = options(argv)
    pair = None
    if given.student or given.teacher:
        from opd.teachers.pair import load_pair

        pair = load_pair(given.student, given.teacher, given.device, given.dtype)
    for path in given.paths:
        if path.is_file() and path.suffix in RECORDS:
            show(str(path), *_of_records(path, pair, given), as_json=given.json)
            continue
        if pair is not None or given.task is not None:
            raise InvalidInput(
                f"{path} is no records file; --student, --teacher and --task need records (.jsonl "
                "or .parquet), which hold prompt_tokens and task"
            )
        for file in batch_files(path, given.all):
            show(str(file), *diagnose(file), as_json=given.json)


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="opd diagnose", description="the panel on saved batches, records or a run folder"
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="batch file, records (.jsonl, .parquet) or run folder")
    add("--json", action="store_true", help="one JSON object a batch or a records file")
    add("--all", action="store_true", help="every saved batch of a run folder")
    add("--student", default="", help="folder or hub name; with --teacher, scores records anew")
    add("--teacher", default="", help="folder or hub name")
    add("--task", help="only the records of this task")
    add("--k", type=int, default=16, help="size of the teacher's top-K when scoring")
    add("--temperature", type=float, help="when scoring; default: the file's, or 1")
    add("--device", default="auto")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args(argv)


def show(
    label: str,
    row: dict[str, float],
    missing: dict[str, str],
    notes: dict[str, str],
    level: dict[str, int],
    as_json: bool,
) -> None:
    """Print a row: JSON on stdout and the rest on stderr, or all of it as a table."""
    beside = sys.stderr if as_json else sys.stdout
    if as_json:
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
        print(json.dumps({"batch": label, **clean}))
    else:
        print(f"\n{label}")
        for number, part in grouped(row, level).items():
            print(f"\n from {LEVELS[number]}\n{table(part)}")
        print()
    for name, lack in missing.items():
        print(f"not computed: {name} ({lack})", file=beside)
    for note in notes.values():
        print(f"note: {note}", file=beside)


def grouped(row: dict[str, float], level: dict[str, int]) -> dict[int, dict[str, float]]:
    """The columns of each level, by the total that they were read from."""
    parts: dict[int, dict[str, Any]] = {}
    for name, value in row.items():
        # a column is its total's name and a suffix
        total = max((t for t in level if name.startswith(t)), key=len)
        parts.setdefault(level[total], {})[name] = value
    return dict(sorted(parts.items()))


def table(row: dict[str, float]) -> str:
    """Aligned lines `name value +- standard error`; metrics by position on one line."""
    lines: list[str] = []
    positions: dict[str, list[str]] = {}
    for name, value in row.items():
        if name.endswith("_se") or (name + "_se" not in row and "@" not in name and value != value):
            continue
        if "@" in name:
            base, where = name.split("@", 1)
            positions.setdefault(base, []).append(f"{where}: {value:.3g}")
            continue
        error = row.get(name + "_se")
        lines.append(f"  {name:36} {value:10.4g}" + (f"  ± {error:.2g}" if error else ""))
    for base, parts in positions.items():
        lines.append(f"  {base} by position   " + "  ".join(parts))
    return "\n".join(lines)
