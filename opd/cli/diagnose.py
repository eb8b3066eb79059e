"""The `opd diagnose` command."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional, UseAppendAction

from diagnostics.errors import InvalidInput
from diagnostics.formats.row_files import SUFFIXES
from diagnostics.io.command import parse_options
from opd.analysis.diagnose import LEVELS, PanelResult, batch_files, diagnose, diagnose_records
from opd.analysis.verdict import Verdict, format_verdict, judge_log, judge_row


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions:
    """Compute the metrics of saved batches, records, dumps of other tools or a run folder."""

    paths: Positional[tuple[Path, ...]]
    """batch file, records or dump (.jsonl, .parquet, .json, .pt), metric log or run folder"""
    format: str | None = None
    """dump format of the files (see docs/formats.md); default: recognised by its fields"""
    rename: UseAppendAction[tuple[str, ...]] = ()
    """FIELD=COLUMN: name in the file, and the column or field to read it as; may be repeated"""
    scores: Literal["sampler", "student", "teacher"] | None = None
    """model of a server's log-probabilities; default: the sampler, read as the student, and of a
    scored prompt the teacher"""
    json: bool = False
    """print one JSON object per file"""
    all: bool = False
    """all saved batches of a run folder, not only the last"""
    student: str = ""
    """folder or hub name; with --teacher, score the records"""
    teacher: str = ""
    """folder or hub name"""
    task: str | None = None
    """use only the records of this task"""
    k: int = 16
    """size of the teacher's top-K when scoring"""
    temperature: float | None = None
    """temperature when scoring; default: the file's, or 1"""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda if available"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of the weights"""


def main(argv: list[str]) -> None:
    """Run `opd diagnose PATH [PATH ...] [--format NAME] [--student M --teacher M] [--json]`."""
    options = parse_options(DiagnoseOptions, argv, "opd diagnose")
    from diagnostics.records.metric_logs import is_metric_log, read_metric_log  # imports torch

    if not options.paths:
        raise InvalidInput("no file is given; see `opd diagnose --help`")
    pair = None
    if options.student or options.teacher:
        from opd.teachers.pair import load_pair

        pair = load_pair(options.student, options.teacher, options.device, options.dtype)
    for path in options.paths:
        if options.format is None and is_metric_log(path):
            if pair is not None or options.task is not None or options.scores is not None:
                raise InvalidInput(
                    f"{path} is a log of metrics, without responses; --student, --teacher, --task "
                    "and --scores need rollouts"
                )
            log_rows = read_metric_log(path, parse_rename(options.rename))
            print_log(str(path), judge_log(log_rows), as_json=options.json)
            continue
        if path.is_file() and path.suffix in SUFFIXES:
            result = diagnose_records(
                path,
                pair,
                task=options.task,
                k=options.k,
                temperature=options.temperature,
                dump_format=options.format,
                rename=parse_rename(options.rename),
                scores=options.scores,
            )
            print_result(str(path), result, as_json=options.json)
            continue
        if pair is not None or options.task is not None or options.format or options.rename:
            raise InvalidInput(
                f"{path} is not a records file; --student, --teacher, --task, --format and "
                f"--rename need records or a dump ({', '.join(SUFFIXES)})"
            )
        for file in batch_files(path, options.all):
            print_result(str(file), diagnose(file), as_json=options.json)


def parse_rename(pairs: tuple[str, ...]) -> dict[str, str]:
    """Parse FIELD=COLUMN options.

    Args:
        pairs: The options.

    Returns:
        Name in the file -> column.

    Raises:
        InvalidInput: An option is not of this form, or two rename to the same column.
    """
    renamed: dict[str, str] = {}
    for pair in pairs:
        name, separator, column = pair.partition("=")
        if not (separator and name and column):
            raise InvalidInput(
                f"--rename {pair!r}: expected FIELD=COLUMN, such as logps=student_logp"
            )
        if name in renamed or column in renamed.values():
            raise InvalidInput(f"--rename {pair!r}: a name occurs twice; give each once")
        renamed[name] = column
    return renamed


def print_result(label: str, result: PanelResult, as_json: bool) -> None:
    """Print a result: JSON on stdout and notes on stderr, or all of it as a table.

    Args:
        label: Name of the file.
        result: Its metrics.
        as_json: Print JSON.
    """
    text_stream = sys.stderr if as_json else sys.stdout
    verdict = judge_row(result.row, result.is_text)
    if as_json:
        json_row = {k: v if math.isfinite(v) else None for k, v in result.row.items()}
        print(json.dumps({"batch": label, **json_row, "verdict": verdict_summary(verdict)}))
    else:
        print(f"\n{label}")
        for number, columns in group_by_level(result.row, result.levels).items():
            print(f"\n from {LEVELS[number]}\n{format_table(columns)}")
        print()
    for name, reason in result.missing.items():
        print(f"not computed: {name} ({reason})", file=text_stream)
    for note in result.notes.values():
        print(f"note: {note}", file=text_stream)
    if not as_json:
        print(f"\n{format_verdict(verdict)}")


def print_log(label: str, verdict: Verdict, as_json: bool) -> None:
    """Print the verdict of a log of metrics."""
    if as_json:
        print(json.dumps({"log": label, "verdict": verdict_summary(verdict)}))
    else:
        print(f"\n{label}\n\n{format_verdict(verdict)}")


def verdict_summary(verdict: Verdict) -> dict[str, Any]:
    """Return the alarms, and the names of the rules that were applied and that were not."""
    return {
        "alarms": {alarm.rule.name: str(alarm) for alarm in verdict.alarms},
        "applied": list(verdict.applied),
        "not_applied": [rule.name for group in verdict.not_applied.values() for rule in group],
    }


def group_by_level(
    row: dict[str, float], level_by_metric: dict[str, int]
) -> dict[int, dict[str, float]]:
    """Group the columns of a row by the access level of their metric."""
    parts: dict[int, dict[str, Any]] = {}
    for name, value in row.items():
        # a column is named after its metric, with a suffix
        total = max((t for t in level_by_metric if name.startswith(t)), key=len)
        parts.setdefault(level_by_metric[total], {})[name] = value
    return dict(sorted(parts.items()))


def format_table(row: dict[str, float]) -> str:
    """Format aligned lines `name value +- standard error`; metrics by position on one line."""
    lines: list[str] = []
    positions: dict[str, list[str]] = {}
    for name, value in row.items():
        if name.endswith("_se") or (name + "_se" not in row and "@" not in name and value != value):
            continue
        if "@" in name:
            base, positions_of_bin = name.split("@", 1)
            positions.setdefault(base, []).append(f"{positions_of_bin}: {value:.3g}")
            continue
        error = row.get(name + "_se")
        lines.append(f"  {name:36} {value:10.4g}" + (f"  ± {error:.2g}" if error else ""))
    for base, parts in positions.items():
        lines.append(f"  {base} by position   " + "  ".join(parts))
    return "\n".join(lines)
