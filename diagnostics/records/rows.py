"""Rows on disk: one JSON object per line."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields, parse_json, short_repr, translate_read_errors
from diagnostics.records.renamed import present_row

Row = dict[str, Any]
POSITION_BIN = re.compile(r"^(.*)@(\d+)-(\d+)$")
"""Name, first and last position of a column by position."""

MAX_STEP = 1 << 53
"""Integers from here on are not exact as float64, in which tables and JavaScript hold them."""


def append_row(path: Path, row: Row) -> None:
    """Append one JSON line; NaN and infinities become null, which every JSON parser can read."""
    finite_row = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    with open(path, "a") as file:
        file.write(json.dumps(finite_row) + "\n")


def read_rows(path: str | Path, required: Mapping[str, type] | None = None) -> list[Row]:
    """Read all complete rows of a file.

    A last line that was truncated by a killed process is skipped; a missing file has no rows.

    Args:
        path: The JSONL file.
        required: Fields that every row must have, and their types, such as {"step": int}.

    Returns:
        The rows.

    Raises:
        InvalidInput: Another line is not UTF-8, is no JSON object, or misses a field; names the
            line.
        OperationFailed: The file cannot be read.
    """
    rows: list[Row] = []
    with translate_read_errors(path):
        if not Path(path).exists():
            return rows
        # not splitlines: text in a row may contain other line separators
        lines = Path(path).read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
        truncated_line = -1
    else:
        truncated_line = len(lines) - 1
    for i, line in enumerate(lines):
        location = f"{path} line {i + 1}"
        try:
            row = parse_json(line.decode("utf-8"), location)
        except UnicodeDecodeError as error:
            if i == truncated_line and error.reason == "unexpected end of data":
                continue
            raise InvalidInput(f"{location} is not UTF-8: {error}") from error
        except InvalidInput:
            if i == truncated_line:
                continue
            raise
        if not isinstance(row, dict):
            raise InvalidInput(f"{location} is not a JSON object: {short_repr(row)}")
        row = present_row(row)
        check_fields(row, required or {}, location)
        if "step" in (required or {}) and not 0 <= row["step"] < MAX_STEP:
            raise InvalidInput(
                f"{location}, field step: {short_repr(row['step'])} is no step; steps count from 0"
            )
        rows.append(row)
    return rows


def position_bin_values(row: Row, name: str) -> dict[tuple[int, int], float]:
    """Return {(first, last position): value} of a metric by position bin; nulls are NaN."""
    values = {}
    for key, value in row.items():
        bin_match = POSITION_BIN.match(key)
        if bin_match and bin_match[1] == name:
            low, high = int(bin_match[2]), int(bin_match[3])
            values[low, high] = float("nan") if value is None else float(value)
    return dict(sorted(values.items()))
