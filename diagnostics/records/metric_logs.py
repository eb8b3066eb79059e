"""Plain metric logs of other trainers as rows, so that alarm rules can be applied to them.

TensorBoard event files, exports of W&B's history (CSV, JSON or JSON Lines), the
`trainer_state.json` of transformers and TRL, and rows of our own. Columns that mean the same as one
of ours get its name, all others keep theirs.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.formats.registry import recognise
from diagnostics.formats.row_files import iter_rows
from diagnostics.io.files import has_type, read_json, short_repr, translate_read_errors
from diagnostics.io.packages import load_package
from diagnostics.records.columns import NAMES
from diagnostics.records.renamed import present_key
from diagnostics.records.rows import Row

STEP_COLUMNS = ("step", "train/global_step", "global_step", "training/global_step", "_step", "Step")
"""Columns of the step, the first of which a log has counts; `_step` is W&B's own counter."""

LOG_COLUMNS = {
    "learning_rate": "lr",
    "actor/lr": "lr",
    "actor/grad_norm": "grad_norm",
    "actor/loss": "loss",
    "completions/mean_length": "response/length",
    "response_length/mean": "response/length",
    "completions/clipped_ratio": "response/truncated_share",
    "response_length/clip_ratio": "response/truncated_share",
    "reward": "response/reward",
    "critic/score/mean": "response/reward",
}
"""Column of TRL, transformers or verl -> ours of the same meaning."""

NO_NAMES: Mapping[str, str] = MappingProxyType({})

EVENTS = "events.out.tfevents*"
HISTORY = "log_history"
SPECIAL_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Text that W&B writes for numbers that JSON does not have."""


def is_metric_log(path: Path) -> bool:
    """Return whether a file or folder is a log of metrics by step, by its name and first row.

    Args:
        path: A file or folder.

    Returns:
        True for event files and folders of them, CSV files, a trainer_state.json, and rows of
        numbers without responses.
    """
    if path.is_dir():
        return any(path.glob(EVENTS))
    if path.match(EVENTS) or path.suffix == ".csv":
        return path.is_file()
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    for _, row in islice(iter_rows(path), 1):
        if not isinstance(row, Mapping):
            return False
        if HISTORY in row:
            return True
        if recognise(row) is not None or NAMES.keys() & row.keys() & RESPONSE_COLUMNS:
            return False
        has_step = any(name in row for name in STEP_COLUMNS)
        numbers = [v for k, v in row.items() if not k.startswith("_")]
        return has_step or all(v is None or _to_number(v) is not None for v in numbers)
    return False


RESPONSE_COLUMNS = {name for name, column in NAMES.items() if column in ("tokens", "sequence")}
"""Names under which a row holds a response's ids."""


def read_metric_log(path: Path, rename: Mapping[str, str] = NO_NAMES) -> list[Row]:
    """Read the rows of a log by ascending step; entries of one step are one row.

    Args:
        path: See `is_metric_log`.
        rename: Column of the log -> column of the rows.

    Returns:
        Rows with "step" and the numbers of the log.

    Raises:
        InvalidInput: No column says the step of a row, a step is not an integer, or there are no
            rows.
        MissingPackage: Event files, and TensorBoard is not installed.
    """
    by_step: dict[int, Row] = {}
    columns: dict[str, None] = {}
    for entry in _entries(path):
        columns |= dict.fromkeys(entry)
        name = next((c for c in STEP_COLUMNS if entry.get(c) not in (None, "")), None)
        if name is None:
            if len(entry) > 1 or not by_step:
                raise InvalidInput(
                    f"{path} has no column of steps ({', '.join(STEP_COLUMNS)}) among "
                    f"{', '.join([*columns][:12])}; export it with the step, which alarms need"
                )
            continue
        step = _to_number(entry[name])
        if step is None or not math.isfinite(step) or step != int(step):
            raise InvalidInput(f"{path}: the step {short_repr(entry[name])} is not an integer")
        row = by_step.setdefault(int(step), {"step": int(step)})
        row |= _present_columns({rename.get(key, key): x for key, x in entry.items()})
    if not by_step:
        raise InvalidInput(f"{path} holds no rows; give a log of metrics by step")
    if absent := [name for name in rename if name not in columns]:
        raise InvalidInput(f"{path} has no column {absent[0]}; it has {', '.join([*columns][:12])}")
    return [by_step[step] for step in sorted(by_step)]


def _present_columns(entry: Mapping[str, Any]) -> Row:
    """Return the numbers of an entry under our names; text is kept for "task" alone."""
    row: Row = {}
    for name, value in entry.items():
        number = _to_number(value)
        if name == "task" and isinstance(value, str):
            row["task"] = value
        if name in STEP_COLUMNS or number is None:
            continue
        row[_present_column(name)] = number
    return row


def _present_column(name: str) -> str:
    """Return our name of a column; transformers' trackers put "train/" before each."""
    short_name = present_key(name.removeprefix("train/"))
    return LOG_COLUMNS.get(name, LOG_COLUMNS.get(short_name, short_name))


def _to_number(value: Any) -> float | None:
    """Return a number, also of text as in CSV files and for W&B's NaN; None for anything else."""
    if has_type(value, float):
        return float(value)
    if not isinstance(value, str):
        return None
    if value in SPECIAL_NUMBERS:
        return SPECIAL_NUMBERS[value]
    try:
        return float(value)
    except ValueError:
        return None


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of a log as they are."""
    if path.is_dir() or path.match(EVENTS):
        yield from _events(path)
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".json" and isinstance(content := read_json(path), Mapping):
        history = content.get(HISTORY)
        if not isinstance(history, list) or not all(isinstance(x, Mapping) for x in history):
            raise InvalidInput(f"{path}: {HISTORY} {short_repr(history)} is not a list of objects")
        yield from history
    else:
        for location, row in iter_rows(path):
            if not isinstance(row, Mapping):
                raise InvalidInput(f"{location}: {short_repr(row)} is not an object with columns")
            yield row


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a CSV file, without the RUN and MIN/MAX that W&B adds to a chart's name."""
    with translate_read_errors(path), path.open(newline="", encoding="utf-8-sig") as file:
        try:
            for row in csv.DictReader(file):
                yield {
                    str(name).rpartition(" - ")[2]: value
                    for name, value in row.items()
                    if name is not None and not name.endswith(("__MIN", "__MAX"))
                }
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path} is not a CSV file of UTF-8 text ({error})") from error


def _events(path: Path) -> Iterable[Mapping[str, Any]]:
    """Return the scalars of event files, one entry a scalar and step."""
    accumulators = load_package(
        "tensorboard.backend.event_processing.event_accumulator", str(path), "tensorboard"
    )
    events = accumulators.EventAccumulator(str(path), size_guidance={accumulators.SCALARS: 0})
    events.Reload()
    for name in events.Tags()[accumulators.SCALARS]:
        for event in events.Scalars(name):
            yield {"step": event.step, name: event.value}
