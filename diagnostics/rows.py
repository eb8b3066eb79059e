"""Rows on disk: one JSON object a line, as every trainer can write and every tool can read."""

import json
import math
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Add one JSON line; NaN and infinities become null, so that every reader can read it."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    with open(path, "a") as file:
        file.write(json.dumps(clean) + "\n")


def read(path: Path) -> list[Row]:
    """All whole rows; a last line that a kill cut short is left out, and a missing file is empty.

    Raises:
      InvalidInput: another line is not UTF-8, or not a JSON object; names the file and the line.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")  # a string of a row may hold other ends of lines
    if not lines[-1]:
        lines.pop()
        cut_short = -1
    else:
        cut_short = len(lines) - 1
    for i, line in enumerate(lines):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            if i == cut_short and error.reason == "unexpected end of data":
                continue
            raise InvalidInput(f"{path} line {i + 1} is not UTF-8: {error}") from error
        except (json.JSONDecodeError, RecursionError) as error:
            if i == cut_short:
                continue
            raise InvalidInput(f"{path} line {i + 1} is not JSON: {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise InvalidInput(f"{path} line {i + 1} is not a JSON object: {line[:80]!r}")
        rows.append(row)
    return rows
