"""Rows on disk: one JSON object a line, as every trainer can write and every tool can read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields, parse_json, reading, short
from diagnostics.records.renamed import present_row

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Add one JSON line; NaN and infinities become null, so that every reader can read it."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    with open(path, "a") as file:
        file.write(json.dumps(clean) + "\n")


def read(path: str | Path, required: Mapping[str, type] | None = None) -> list[Row]:
    """All whole rows; a last line that a kill cut short is left out, and a missing file is empty.

    Args:
      required: fields that every row must have, and their types, such as {"step": int}.

    Raises:
      InvalidInput: another line is not UTF-8, no JSON object, or lacks a field; names the line.
      OperationFailed: the file cannot be read.
    """
    rows: list[Row] = []
    with reading(path):
        if not Path(path).exists():
            return rows
        lines = Path(path).read_bytes().split(b"\n")  # a row's text may hold other ends of lines
    if not lines[-1]:
        lines.pop()
        cut_short = -1
    else:
        cut_short = len(lines) - 1
    for i, line in enumerate(lines):
        where = f"{path} line {i + 1}"
        try:
            row = parse_json(line.decode("utf-8"), where)
        except UnicodeDecodeError as error:
            if i == cut_short and error.reason == "unexpected end of data":
                continue
            raise InvalidInput(f"{where} is not UTF-8: {error}") from error
        except InvalidInput:
            if i == cut_short:
                continue
            raise
        if not isinstance(row, dict):
            raise InvalidInput(f"{where} is not a JSON object: {short(row)}")
        row = present_row(row)
        check_fields(row, required or {}, where)
        rows.append(row)
    return rows
